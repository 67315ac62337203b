"""What of PEFT's own tests fails with this method or is left out, by a regular expression of its name, and why."""

FP32 = "M stays fp32 whatever is asked for: in 16 bits a step of 1e-4 on an M of 0.3 moves nothing"
OTHER_BASE = "the test loads an adapter onto another random model, which is refused: its directions are others"
NO_BIAS = (
    "the state has biases for which the config that it is loaded with does not ask: a file does not touch the base"
)
MADE_UP = "the test makes up the state's numbers, which do not match its digests and are refused"
OF_ALL = "each key must name a layer, and that of the digest of all of them, qsvft_whole, names none"
NOISE = "the change that init_weights=False makes, 0.3 |W|, is smaller than the test's threshold"
RECORDS = "records of the base and the pattern have values: what is made without values is M"
REFUSED = "a shard is refused when it is saved, where LoRA's would be written with a warning"

EXPECTED: dict[str, str] = {
    r"::test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-": FP32,
    # T5 in float16 has float32 of its own, with which the test is content.
    r"::test_add_adapter_no_autocast_adapter_dtype\[(?!dtype0\S*T5)": FP32,
    r"::TestRequiresGrad::test_loading_model_(with_modules_to_save_)?requires_grad_set_correctly\[": OTHER_BASE,
    r"::test_set_peft_model_state_dict_preserves_input": OTHER_BASE,
    r"::test_save_load_roundtrip_fsdp_wrapped_learnable_bias\[": NO_BIAS,
    r"::test_inject_from_state_dict_(low_cpu_mem_usage_with|model_with)_weight_conversion": MADE_UP,
    r"::test_prefix_removal_is_undone": MADE_UP,
    r"::test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name": OF_ALL,
    r"::TestLoraConversionOfQSVFT::test_converted_lora_(approximates|with_multiple)": NOISE,
    r"::TestLoraConversionOfQSVFT::test_convert_float16_dtype": FP32,
    r"::test_inject_from_state_dict_low_cpu_mem_usage$": RECORDS,
    r"::test_save_pretrained_warns_for_unsharded_state_dict": REFUSED,
}
LEFT_OUT: dict[str, str] = {
    r"::test_mixed_adapter_batches_(lora_conv|mha_)": "of layers that are not linear",
    r"::test_model_with_unsupported_layers_raises": "of a convolution, which is refused before anything is converted",
    r"QSVFT.*target_parameters_": "of LoRA's target_parameters",
    r"OfQSVFT::test_forward_changes_output.*bnb_4bit": "the base runs first, for which some CPUs repack its weights",
    r"QSVFT.*stable_diffusion": "of diffusers",
}
