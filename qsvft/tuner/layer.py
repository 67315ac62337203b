"""One adapted linear layer.

    sides="one", n <= m (input side)            sides="one", m < n (output side)

    x --+------------------(+)--> W --> y       x --> W --+------------------(+)--> y
        |                   |                             |                   |
        +-> Vᵀ -> S⁻¹M -> V +                             +-> Uᵀ -> MS⁻¹ -> U +

    sides="both" (the paper's)

    x --+--> W ------------(+)--> y             with residual=True in directions from data a further product,
        |                   |                   E = (W - NF4(W)) V, takes Vᵀ to the sum
        +-> Vᵀ -> M -> U ---+

W stays in ``base_layer``, in whatever way it is stored. U and V are frozen bases, held once for all
adapters that agree on them (:mod:`qsvft.tuner.form`). M is fp32, one per adapter; so is the scale 1/s, measured
on the vectors as they are held.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..maths.autocast import in_compute_dtype
from ..maths.own_tensor import of_its_own
from ..maths.updates import bounded_inverse, input_side_update, output_side_update, two_sided_update, unit_of
from ..storage.factor_files import FactorSource
from ..storage.factors import frobenius_norm, measured_scale
from ..storage.residual import ResidualLinear
from ..storage.weights import all_finite, check_weight, dense_layer, product_without_bias, weight_digest
from .adapted import AdaptedLinear
from .attach import choose_pattern, residual_base
from .bases import hold_bases
from .config import QSVFTConfig
from .form import Form, form_of
from .mixed_batch import Rows, check_rows, on_rows, rows_by_adapter
from .parameter import Coefficients
from .probe import OTHER_FACTORS, SIZE, TOLERANCE, fixed_noise, relative_difference, sketch, times_transpose
from .sources import NOWHERE, DataDirections, Sources
from .targets import rank_of, shape_of

_ROWS = 1024
_NOISE = 0.3
"""What ``init_weights=False`` changes of a weight, relative to its Frobenius norm."""


class QSVFTLinear(AdaptedLinear):
    """A linear layer with SVFT adapters: y = (W + U M Vᵀ) x + b.

    Args:
        base_layer: the layer to adapt; any layer that is linear in x and has in_features/out_features.
        adapter_name: name of the first adapter.
        config: its configuration.
        module_name: the layer's name in the model, for messages and for the random pattern's seed.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: QSVFTConfig,
        module_name: str,
        sources: Sources = NOWHERE,
    ) -> None:
        super().__init__(base_layer, module_name, shape_of(base_layer, module_name))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, sources)

    def update_layer(self, adapter_name: str, config: QSVFTConfig, sources: Sources = NOWHERE) -> None:
        """Add an adapter: decompose what is not held or stored, choose the pattern, put M at zero."""
        check_weight(self.module_name, self.original_base())
        shape = (self.out_features, self.in_features)
        rank = rank_of(config, self.module_name, shape)
        form = form_of(config, shape, rank)
        if config.residual_base:
            base, bits = self.original_base(), config.stored_bits
            own = sources.own_bases(self.module_name, form.sizes(shape), rank, bits, next(base.parameters()).device)
            made = residual_base(base, rank, config, self.module_name, sorted(self.settings), own)
            self.base_layer = self.base_layer if self._unmerged else made
        weight = self.original_weight()
        if not weight.is_meta and not all_finite(weight):
            raise ValueError(
                f"{self.module_name}: its weight holds NaN or Inf; expected finite numbers. The checkpoint "
                "is damaged or overflowed; load it again."
            )
        self.base_digest = self.base_digest or weight_digest(self.original_base())
        twin = self._twin(config, sources)
        if twin is None:
            self._hold(adapter_name, form, weight, rank, config, sources)
        else:
            self._share(adapter_name, twin)
        values = torch.zeros(self.pattern(adapter_name).count, dtype=torch.float32, device=weight.device)
        if not config.init_weights and not weight.is_meta:
            size = _NOISE * float(frobenius_norm(weight)) / self.units[adapter_name]
            values.normal_(std=size / values.numel() ** 0.5)
        self.qsvft_M[adapter_name] = Coefficients(values)
        self._set_probe(adapter_name, weight)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _hold(self, adapter: str, form: Form, weight: Tensor, rank: int, config: QSVFTConfig, sources: Sources) -> None:
        """Find or make what an adapter is, but for its M: bases, pattern, alpha and scale."""
        form, source = hold_bases(self, form, weight, rank, config, sources)
        self.settings[adapter], self.forms[adapter], self.came_from[adapter] = config, form, source
        pattern = choose_pattern(config, form, rank, weight, self.basis, self.module_name)
        self.qsvft_pattern[adapter] = pattern.to(weight.device)
        self.units[adapter] = 1.0
        if config.unit == "weight" and not weight.is_meta:
            on_data = source.lengths.get(self.module_name) if isinstance(source, DataDirections) else None
            length = frobenius_norm(weight) if on_data is None else torch.tensor(on_data, dtype=torch.float64)
            self.units[adapter] = float(unit_of(length, pattern.count, pattern.rank))
        if form.kind != "both":
            self.qsvft_scale[adapter] = self._scale(adapter, weight, source, source is sources.own)

    def take_unit(self, adapter: str, unit: float, own_scale: bool) -> None:
        """Take over the alpha that an adapter's M was trained with; ``own_scale``: its scale is in its file as well."""
        self.units[adapter], weight = unit, self.original_weight()
        if self.forms[adapter].kind != "both" and not own_scale:
            self.qsvft_scale[adapter] = self._scale(adapter, weight, self.came_from[adapter], trained_with=False)
        self._set_probe(adapter, weight)

    def _twin(self, config: QSVFTConfig, sources: Sources) -> str | None:
        """The adapter that has this very config, unless there are newer directions from data than its own."""
        for name, other in self.settings.items():
            if other is config and sources.data in (None, self.came_from[name]):
                return name
        return None

    def _share(self, adapter: str, twin: str) -> None:
        """Be what another adapter is, but for its M, so that the same M is the same map: what its file said of pattern
        and alpha does not follow from the config. TRL copies M so to the adapter that is its reference."""
        every: tuple[dict[str, Any], ...] = (self.settings, self.forms, self.came_from, self.units)
        for held in every:
            held[adapter] = held[twin]
        self.qsvft_pattern[adapter] = copy.deepcopy(self.pattern(twin))
        if twin in self.qsvft_scale:
            self.qsvft_scale[adapter] = self.qsvft_scale[twin].clone()

    def _scale(self, adapter: str, weight: Tensor, source: FactorSource | None, trained_with: bool) -> Tensor:
        """alpha/s of a one-sided form, (rank,) fp32, as it is stored with the adapter, or else as it is measured."""
        form, rank = self.forms[adapter], self.pattern(adapter).rank
        stored = None
        if source is not None:
            stored = source.scale(self.module_name, form.inward.plain, rank, weight.device)
        if stored is not None and trained_with:
            return stored
        if stored is None:
            s, rms = measured_scale(weight, self.basis(form.inward), form.inward.side, rank)
            stored = bounded_inverse(s, rms)
        return stored * self.units[adapter]

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            check_rows(self, x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base(x, *args, **kwargs)
        if self.merged:
            return self._base(x, *args, **kwargs)
        active: dict[str, Rows] = {name: None for name in self.active_adapters if name in self.qsvft_M}
        if adapter_names is not None:
            active = {name: rows for name, rows in rows_by_adapter(adapter_names, x).items() if name in self.qsvft_M}
        for name in active:
            self._check(name, self._loads)
        inner = x
        for name, rows in active.items():
            if self.forms[name].kind == "input":
                inner = on_rows(rows, partial(self._updated, name), inner, x)
        # What a one-sided adapter reads is the base alone; beside one, and where rows differ, those on a residual base
        # read x as any other.
        alike = adapter_names is None and all(self.forms[name].kind == "both" for name in active)
        on_residual = [name for name in active if alike and self._reads_residual(name)]
        if on_residual:
            kwargs["more"] = lambda h: self._residual_coefficients(on_residual, h)
        y = self._base(inner, *args, **kwargs)
        result, wx = y if inner is x else of_its_own(y), None
        for name, rows in active.items():
            kind = self.forms[name].kind
            if kind == "output":
                wx = self._without_bias(x, y) if wx is None else wx
                result = on_rows(rows, partial(self._updated, name), result, wx)
            elif kind == "both" and name not in on_residual:
                result = on_rows(rows, partial(self._updated, name), result, x)
        return result

    def _reads_residual(self, adapter: str) -> bool:
        """Whether an adapter acts on the coefficients that its residual base computes anyway."""
        return self.settings[adapter].residual_base and isinstance(self.base_layer, ResidualLinear)

    def _residual_coefficients(self, adapters: list[str], h: Tensor) -> Tensor:
        def product(name: str, M: Tensor, h: Tensor) -> Tensor:
            return self.pattern(name).product(h, M, self.scale_of(name))

        z = [self.qsvft_M[name](partial(product, name), h) for name in adapters]
        return sum(z[1:], z[0])

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def _without_bias(self, x: Tensor, y: Tensor) -> Tensor:
        """W x of y = W x + b, for the output side. y - b would do, but y was rounded where the bias may be large
        (Qwen's is), and M's gradient would read that rounding; so a layer with a bias takes a product of its own."""
        bias = getattr(self.base_layer, "bias", None)
        if not isinstance(bias, Tensor):
            return y
        wx = product_without_bias(self.base_layer, x)
        return y - bias.to(y.dtype) if wx is None else wx

    def _updated(self, adapter: str, base: Tensor, x: Tensor) -> Tensor:
        """base plus the adapter's update of x, computed in the compute dtype (autocast's if active)."""
        products_alone = self.forms[adapter].kind == "both" and self.settings[adapter].pattern == "dense"

        def update(M: Tensor, base: Tensor, x: Tensor) -> Tensor:
            return in_compute_dtype(x, lambda a: self._apply_form(adapter, base, a, M), products_alone)

        updated: Tensor = self.qsvft_M[adapter](update, base, x)
        return updated

    def _apply_form(self, adapter: str, base: Tensor, a: Tensor, M: Tensor) -> Tensor:
        pattern, form = self.pattern(adapter), self.forms[adapter]
        scale = self.scale_of(adapter)
        if form.kind == "both":
            U, V = self.basis(form.outward), self.basis(form.inward)
            E = None if form.error is None else self.basis(form.error)
            return two_sided_update(base, a, U, V, M, pattern, scale, E)
        assert isinstance(scale, Tensor)
        basis = self.basis(form.inward)
        if form.kind == "input":
            return input_side_update(base, a, basis, scale, M, pattern)
        return output_side_update(base, a, basis, scale, M, pattern)

    def scale_of(self, adapter: str) -> Tensor | float | None:
        """What multiplies the rows (or columns) of M: alpha, over s in a one-sided form; None where that is 1."""
        if self.forms[adapter].kind != "both":
            return self.qsvft_scale[adapter]
        return None if self.settings[adapter].unit == "one" else self.units[adapter]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _check(self, adapter: str, loads: int) -> None:
        """Compiled, it runs while the graph is traced, and again where ``loads`` is another number: it needs values."""
        M = self.M(adapter)
        if M.dtype != torch.float32:
            raise RuntimeError(
                f"{self.module_name}: M of adapter '{adapter}' is {M.dtype}; expected torch.float32. Something "
                "cast the trainable parameters (small steps would be lost in it). Leave the adapter out of that "
                "cast, or load the adapter again."
            )
        if adapter not in self._verified:
            self.verify(adapter)

    def _set_probe(self, adapter: str, weight: Tensor) -> None:
        probe = self.compute_probe(adapter, weight)
        self._expected_probe[adapter] = probe
        self.qsvft_probe[adapter] = self.probe_here(adapter)
        self.verify_again(adapter)

    @torch.no_grad()
    def compute_probe(self, adapter: str, weight: Tensor) -> Tensor:
        """Eight numbers that depend on all of dW's ingredients but M; see :mod:`qsvft.tuner.probe`."""
        if weight.is_meta:
            return weight.new_empty(SIZE, dtype=torch.float32)
        values = fixed_noise(self.pattern(adapter).count, 2, weight.device).float()
        x = fixed_noise(self.in_features, 1, weight.device).unsqueeze(0)
        return sketch(self._apply_delta(adapter, x, values, weight))

    def _apply_delta(self, adapter: str, x: Tensor, values: Tensor, W: Tensor) -> Tensor:
        """dW x in x's dtype for rows x (t, n), with the factors as held."""
        form = self.forms[adapter]
        if form.kind == "input":
            return times_transpose(self._apply_form(adapter, torch.zeros_like(x), x, values), W)
        if form.kind == "output":
            wx = times_transpose(x, W)
            return self._apply_form(adapter, torch.zeros_like(wx), wx, values)
        return self._apply_form(adapter, x.new_zeros(x.shape[0], self.out_features), x, values)

    def refuse(self, adapter: str) -> None:
        """Let nobody use an adapter that was refused when it was loaded, but that stays attached."""
        self.qsvft_probe[adapter].fill_(torch.nan)
        self.verify_again(adapter)

    def probe_here(self, adapter: str) -> Tensor:
        """The probe that an adapter has on this base."""
        return self._expected_probe[adapter].clone()

    def probe_difference(self, adapter: str, probe: Tensor) -> float:
        """Relative difference of a saved probe to the one computed on this base."""
        return relative_difference(probe.cpu(), self._expected_probe[adapter].cpu())

    def verify(self, adapter: str) -> None:
        """Refuse an adapter whose stored probe does not fit this base, whatever loaded it.

        Raises:
            ValueError: naming the module, the difference found and what to do.
        """
        probe = self.qsvft_probe[adapter]
        if not probe.is_meta:
            difference = self.probe_difference(adapter, probe)
            if difference > TOLERANCE:
                raise ValueError(
                    f"{self.module_name}: adapter '{adapter}' does not fit this base model: its probe differs by "
                    f"{difference:.3g} (expected at most {TOLERANCE}). Load it on the base it was trained on, with "
                    f"the same bits and quantisation settings. {OTHER_FACTORS}"
                )
        self._verified.add(adapter)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW = U M Vᵀ in fp32, what the forward applies, with the factors and the scale as held.

        (m, n) like the base layer's weight, or (n, m) where that is a Conv1D.
        """
        delta = self._delta(adapter, self.original_weight().float())
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _delta(self, adapter: str, W: Tensor) -> Tensor:
        M, n = self.M(adapter).detach(), self.in_features
        delta = torch.empty(n, self.out_features, dtype=torch.float32, device=W.device)
        for start in range(0, n, _ROWS):  # of the unit matrix, which as a whole may be larger than the weight
            rows = delta[start : start + _ROWS]
            unit = torch.zeros(len(rows), n, dtype=torch.float32, device=W.device)
            unit[:, start:].fill_diagonal_(1.0)
            rows.copy_(self._apply_delta(adapter, unit, M, W))
        return delta.T

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> Tensor:
        """W + dW of these adapters, (m, n) in fp32, of the weight without any that is merged."""
        W = self.original_weight().float()
        merged = W.clone()
        for name in adapters:
            merged += self._delta(name, W)
        return merged

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base layer by a dense one with W + dW.

        A 4-bit weight cannot take dW (at 1 % of |W| the change left after rounding to NF4 has cosine 0.03),
        so the merged layer is dense, in the dtype the weight had before it was quantised. The original is
        kept until :meth:`unmerge`, which gives it back bit for bit.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.qsvft_M]
        if not names:
            return
        for name in names:
            self._check(name, self._loads)
            try:
                self.check_finite(name)
            except ValueError as error:  # PEFT's words, which callers know, and ours
                broken = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                raise ValueError(f"{broken}: {error}") from error
        original = self.original_base()
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"{self.module_name}: merging {names} gives NaN or Inf; expected finite weights. The adapter is "
                "damaged or its training diverged."
            )
        self._unmerged = [original]
        self.base_layer = dense_layer(original, merged)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Put the original base layer back."""
        if self._unmerged:
            device = next(self.base_layer.parameters()).device
            self.base_layer = self._unmerged.pop().to(device)
        self.merged_adapters = []

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; bases that no other adapter reads go as well. Directions beyond the others' ranks stay."""
        super().delete_adapter(adapter_name)
        self._expected_probe.pop(adapter_name, None)
        self._verified.discard(adapter_name)
        read = {key for form in self.forms.values() for key in form.keys}
        for key in set(self.qsvft_bases) - read:
            del self.qsvft_bases[key]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> QSVFTLinear:
        """Move with the model, but keep dtypes: M and the scales stay fp32, the factors as they are held."""
        scales = dict(self.qsvft_scale.items())
        super()._apply(fn, recurse)
        for base in self._unmerged:  # not a submodule, so nobody else moves it
            base._apply(fn, recurse)
        for name, old in scales.items():
            if (new := self.qsvft_scale[name]).dtype != old.dtype:
                self.qsvft_scale[name] = old.to(new.device)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: PEFT's own would cast M to the compute dtype."""
        target = device if device is not None else self.device
        if adapter_name in self.qsvft_M and not self.M(adapter_name).is_meta:
            self.qsvft_M[adapter_name].to(target)
            self.qsvft_pattern[adapter_name].to(target)

    def extra_repr(self) -> str:
        kind = quantization_extra_repr(self)
        return f"in_features={self.in_features}, out_features={self.out_features}" + (f", {kind}" if kind else "")
