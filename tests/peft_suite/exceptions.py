"""What of PEFT's own tests fails with this method, by a regular expression of the test's name, and why."""

FP32 = "M stays fp32 whatever is asked for: in 16 bits a step of 1e-4 on an M of 0.3 moves nothing"
OTHER_BASE = "the test loads an adapter onto another random model, which is refused: its directions are others"

EXPECTED: dict[str, str] = {
    r"::test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-": FP32,
    # T5 in float16 has float32 of its own, with which the test is content.
    r"::test_add_adapter_no_autocast_adapter_dtype\[(?!dtype0\S*T5)": FP32,
    r"::TestRequiresGrad::test_loading_model_(with_modules_to_save_)?requires_grad_set_correctly\[": OTHER_BASE,
}
