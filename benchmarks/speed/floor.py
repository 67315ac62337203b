"""Each part of an adapted linear and of a step beside its floor: where time goes that the mathematics does not ask for.

    floor = max(flops asked for / rate of bf16 products, bytes asked for / bandwidth of a copy)

A part may lie below its floor by a little: what it reads lies in a cache. What a whole takes beyond the sum of its
parts is Python's, autograd's, and copies that are in no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from alone import DTYPE, alone
from bench import Bench
from clock import spread
from described import described, linears
from layers import Place, layer_of, places
from layers import step as layer_step
from operators import counted
from parts import FORWARD, Part
from rivals import Rival
from roof import Roof, measured
from sizes import Model, one_layer
from steps import Stepper
from torch import Tensor, nn

from qsvft.lean.cross_entropy import chunked_cross_entropy
from qsvft.memory.methods import parse_method
from qsvft.memory.scenario import Scenario

ROOF, STAGE, STEP = "roof", "floor", "floor of a step"
WHOLE = "whole"
ADAMW_BYTES = 28
"""Of a parameter and a step: the parameter, its gradient and two moments are read, all but the gradient written."""


def run(bench: Bench, models: Sequence[str], tokens: Sequence[int], whole: Sequence[Model], quick: bool) -> None:
    """The machine's roof; then every linear with every rival, part by part; then whole steps."""
    sizes = {"sizes": (512,), "copied": 2**24, "rounds": 3} if quick else {}
    bench.attempt(ROOF, ROOF, lambda: measured(bench.device, **sizes).to_dict())
    row = bench.rows.find(ROOF)
    assert row is not None
    roof = Roof(row["flops"], row["bandwidth"])
    for model in models:
        for rival in bench.rivals:
            _of_layer(bench, roof, model, tokens, rival)
    for one in whole:
        for rival in bench.rivals[:2] if quick else bench.rivals:
            case = f"{STEP} | {one.name} | {one.tokens} tokens | {rival.name}"
            bench.attempt(STEP, case, partial(_of_step, bench, roof, one, rival))


def _of_layer(bench: Bench, roof: Roof, model: str, tokens: Sequence[int], rival: Rival) -> None:
    cases = {place.case(STAGE, t, f" | {rival.name}"): (place, t) for place in places(model) for t in tokens}
    wanted = bench.left(cases)
    if not wanted:
        return
    alone_with = Bench(bench.rows, (rival,), bench.device, bench.rounds, bench.seconds, bench.console)
    try:
        ((_, scenario),) = alone_with.build(one_layer(model))[0].items()
    except (ValueError, RuntimeError) as error:
        reason = str(error)
        for case in wanted:
            bench.attempt(STAGE, case, partial(_refuse, reason))
        return
    for case in wanted:
        place, t = cases[case]
        bench.attempt(STAGE, case, partial(_parts, bench, roof, rival, scenario.model, place, t))


def _refuse(reason: str) -> dict[str, Any]:
    raise ValueError(reason)


def _parts(bench: Bench, roof: Roof, rival: Rival, model: nn.Module, place: Place, tokens: int) -> dict[str, Any]:
    layer = layer_of(model, place)
    linear = described(layer)
    whole, runs = layer_step(layer, tokens, bench.device), alone(layer, linear, tokens)
    whole()  # what a first step settles is no part of it
    ran = counted(whole)
    steps: dict[str, Callable[[], Any]] = {WHOLE: whole, **{f"{name}, {when}": of for (name, when), of in runs.items()}}
    times = bench.time(steps)
    rows = [_row(roof, part, times[f"{part.name}, {part.when}"]) for part in linear.parts(tokens)]
    about = {"model": place.model, "linear": place.leaf, "shape": [place.m, place.n], "tokens": tokens}
    return {
        **about,
        "method": rival.name,
        "parts": rows,
        "whole": _total(rows, times[WHOLE]),
        "flops_done": linear.done(tokens),
        "flops_counted": ran.flops,
        "operators": {"products": ran.products, "copies": ran.copies, "looks": ran.looks, "total": ran.total},
    }


def _row(roof: Roof, part: Part, times: list[float]) -> dict[str, Any]:
    median, low, high = spread(times)
    floor = roof.floor_ms(part.flops, part.nbytes)
    about = {"part": part.name, "when": part.when, "flops": part.flops, "done": part.done, "bytes": part.nbytes}
    return {**about, "median_ms": median, "p20_ms": low, "p80_ms": high, "floor_ms": floor, "over": median / floor}


def _total(rows: Sequence[Mapping[str, Any]], times: list[float]) -> dict[str, float]:
    """The whole beside its parts' floors and times; what no part explains is ``between``."""
    median, low, high = spread(times)
    floor, parts = (sum(row[key] for row in rows) for key in ("floor_ms", "median_ms"))
    found = {"median_ms": median, "p20_ms": low, "p80_ms": high, "floor_ms": floor, "over": median / floor}
    return {**found, "parts_ms": parts, "between_ms": median - parts}


def _of_step(bench: Bench, roof: Roof, model: Model, rival: Rival) -> dict[str, Any]:
    alone_with = Bench(bench.rows, (rival,), bench.device, bench.rounds, bench.seconds, bench.console)
    ((_, scenario),) = alone_with.build(model.config)[0].items()
    stepper = Stepper(scenario, fused=True, autocast=True)
    batch = stepper.tokens(model.tokens)
    stepper.step(batch)
    asked = {part.name: part for part in step_parts(scenario, model.tokens)}
    runs = dict(_step_runs(scenario, stepper, rival, batch))
    times = bench.time({WHOLE: lambda: stepper.step(batch), **runs})
    rows = [_row(roof, asked[name], times[name]) for name in runs]
    left = sum(row["median_ms"] for row in rows)
    whole, _, _ = spread(times[WHOLE])
    linear = asked[LINEARS]
    of_linears = sum(_floor_of_linears(scenario, model.tokens, roof))
    floor = of_linears + sum(row["floor_ms"] for row in rows)
    rest = {"part": LINEARS, "flops": linear.flops, "bytes": linear.nbytes, "median_ms": whole - left}
    rows.append({**rest, "floor_ms": of_linears, "over": (whole - left) / of_linears if of_linears else None})
    found = {"median_ms": whole, "floor_ms": floor, "over": whole / floor}
    return {"model": model.name, "tokens": model.tokens, "method": rival.name, "parts": rows, "whole": found}


LINEARS = "linears, norms and what is between"
RECOMPUTED, ATTENTION, LOSS, OPTIMIZER = "recomputation", "attention", "loss", "optimizer"


def step_parts(scenario: Scenario, tokens: int) -> Iterator[Part]:
    """What a step asks for: of its linears, of computing layers again, of attention, the loss and the optimizer."""
    every = [described(layer) for _, layer in linears(scenario.model)]
    config: Any = scenario.base.config
    heads, head = config.num_attention_heads, _head_size(config)
    square = tokens**2 * heads * head * config.num_hidden_layers  # causal: half of 4
    qkv = 2 * tokens * head * heads * config.num_hidden_layers
    yield _whole(LINEARS, sum(one.work(tokens) for one in every), sum(_nbytes(one.parts(tokens)) for one in every))
    again = [[part for part in one.parts(tokens) if part.when == FORWARD] for one in every]
    flops = sum(part.flops for parts in again for part in parts)
    yield _whole(RECOMPUTED, flops + 2 * square, sum(map(_nbytes, again)) + 4 * qkv)
    yield _whole(ATTENTION, 7 * square, 12 * qkv)
    size, width = config.vocab_size, config.hidden_size
    yield _whole(LOSS, 4 * tokens * size * width, 4 * size * width + 8 * tokens * size)
    trained = sum(p.numel() for p in scenario.model.parameters() if p.requires_grad)
    yield _whole(OPTIMIZER, 0, ADAMW_BYTES * trained)


def _whole(name: str, flops: int, nbytes: float) -> Part:
    return Part(name, "step", flops, nbytes, flops, 0)


def _nbytes(parts: Sequence[Part]) -> float:
    return sum(part.nbytes for part in parts)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _floor_of_linears(scenario: Scenario, tokens: int, roof: Roof) -> Iterator[float]:
    for _, layer in linears(scenario.model):
        for part in described(layer).parts(tokens):
            yield roof.floor_ms(part.flops, part.nbytes)


def _step_runs(
    scenario: Scenario, stepper: Stepper, rival: Rival, batch: Tensor
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each of those but the linears, run alone."""
    base: Any = scenario.base
    config, device, tokens = base.config, batch.device, batch.shape[1]
    body = base.base_model

    def again() -> None:
        with torch.no_grad(), torch.autocast(device.type, DTYPE):
            body(input_ids=batch)

    yield RECOMPUTED, again
    shape = (1, config.num_attention_heads, tokens, _head_size(config))
    q, k, v, g = (torch.randn(shape, device=device).to(DTYPE) for _ in range(4))
    leaves = tuple(t.requires_grad_() for t in (q, k, v))

    def attention() -> None:
        for _ in range(config.num_hidden_layers):
            torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, g)

    yield ATTENTION, attention
    hidden = torch.randn(tokens, config.hidden_size, device=device).to(DTYPE).requires_grad_()
    weight = scenario.head.weight.detach()
    chunked = parse_method(rival.text).chunked_loss

    def loss() -> None:
        with torch.autocast(device.type, DTYPE):
            if chunked:
                found = chunked_cross_entropy(hidden, weight, batch.view(-1))
            else:
                found = F.cross_entropy(F.linear(hidden, weight).float(), batch.view(-1))
        torch.autograd.grad(found, hidden)

    yield LOSS, loss
    optimizer = stepper.optimizer
    if optimizer is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) for p in trained]

        def update() -> None:
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        yield OPTIMIZER, update
