"""One adapted linear layer.

    sides="one", n <= m (input side)            sides="one", m < n (output side)

    x --+------------------(+)--> W --> y       x --> W --+------------------(+)--> y
        |                   |                             |                   |
        +-> Vᵀ -> S⁻¹M -> V +                             +-> Uᵀ -> MS⁻¹ -> U +

    sides="both" (the paper's)

    x --+--> W ------------(+)--> y
        |                   |
        +-> Vᵀ -> M -> U ---+

W stays in ``base_layer``, in whatever way it is stored. U and V are bf16, one set for all adapters of
the layer. M is fp32, one per adapter. The factor s is measured on the rounded vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .. import patterns
from ..decomposition import Sides, small_side
from ..factors import Factors, make_factors, needed_sides
from ..functional import bounded_inverse, input_side_update, output_side_update, two_sided_update
from ..quantization import check_weight, dense_layer, dense_weight, product_without_bias, read_through, weight_digest
from .config import QSVFTConfig
from .parameter import Float32Parameter
from .probe import SIZE, TOLERANCE, fixed_noise, relative_difference, sketch
from .targets import rank_of, shape_of


class QSVFTLinear(nn.Module, BaseTunerLayer):
    """A linear layer with SVFT adapters: y = (W + U M Vᵀ) x + b.

    Args:
        base_layer: the layer to adapt; any layer that is linear in x and has in_features/out_features.
        adapter_name: name of the first adapter.
        config: its configuration.
        module_name: the layer's name in the model, for messages and for the random pattern's seed.
    """

    adapter_layer_names = ("qsvft_M",)
    other_param_names = ("qsvft_pattern", "qsvft_probe", "settings")

    qsvft_U: Tensor | None
    qsvft_V: Tensor | None
    qsvft_s: Tensor
    qsvft_rms: Tensor
    base_layer: nn.Module
    # BaseTunerLayer's, for the type checker.
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: QSVFTConfig, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.out_features, self.in_features = shape_of(base_layer, module_name)
        self.settings: dict[str, QSVFTConfig] = {}
        self.qsvft_M = nn.ParameterDict()
        self.qsvft_pattern = nn.ModuleDict()
        self.qsvft_probe = BufferDict({}, persistent=True)
        # Buffers, so that they move with the model; not persistent and not keyed by adapter, so that
        # PEFT neither saves nor upcasts them.
        for name in ("qsvft_U", "qsvft_V", "qsvft_s", "qsvft_rms"):
            self.register_buffer(name, None, persistent=False)
        self.base_digest: bytes = b""
        self.merged_adapters: list[str] = []
        self._unmerged: list[nn.Module] = []  # in a list: it is not part of the module tree
        self._expected_probe: dict[str, Tensor] = {}
        self._verified: set[str] = set()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # --- attaching an adapter ---------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: QSVFTConfig) -> None:
        """Add an adapter: decompose if needed, choose the pattern, put M at zero."""
        check_weight(self.module_name, self.original_base())
        rank = rank_of(config, self.module_name, (self.out_features, self.in_features))
        weight = self.original_weight()
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{self.module_name}: its weight holds NaN or Inf; expected finite numbers. The checkpoint "
                "is damaged or overflowed; load it again."
            )
        self._ensure_factors(weight, rank, _sides(config))
        self.settings[adapter_name] = config
        self.qsvft_pattern[adapter_name] = self._make_pattern(config, rank, weight).to(weight.device)
        values = torch.zeros(self.pattern(adapter_name).count, device=weight.device)
        self.qsvft_M[adapter_name] = Float32Parameter(values)
        self._set_probe(adapter_name, weight)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _ensure_factors(self, weight: Tensor, rank: int, sides: Sides) -> None:
        """Hold at least ``rank`` rows of the factors that ``sides`` needs; rows held stay as they are."""
        needs = needed_sides(sides, weight.shape)
        held = (self.qsvft_U, self.qsvft_V)
        missing = [need and (f is None or f.shape[0] < rank) for need, f in zip(needs, held, strict=True)]
        if not any(missing):
            return
        self.base_digest = weight_digest(self.original_base())
        if self.qsvft_s is not None:
            rank = max(rank, self.qsvft_s.shape[0])
        new = make_factors(weight, rank, sides)
        self._hold("qsvft_U", new.U)
        self._hold("qsvft_V", new.V)
        self._hold("qsvft_s", new.s)
        self.qsvft_rms = new.rms

    def _hold(self, name: str, new: Tensor | None) -> None:
        old = getattr(self, name)
        if old is not None and new is not None:
            new = torch.cat([old, new[old.shape[0] :]])
        setattr(self, name, new if new is not None else old)

    def _make_pattern(self, config: QSVFTConfig, rank: int, weight: Tensor) -> patterns.Pattern:
        d = config.off_diagonals
        if config.pattern == "plain":
            return patterns.plain(rank)
        if config.pattern == "banded":
            return patterns.banded(rank, d)
        if weight.is_meta:
            return patterns.IndexPattern.without_values(rank, patterns.banded_count(rank, d))
        if config.pattern == "random":
            return patterns.random_entries(rank, d, f"{config.seed}:{self.module_name}")
        U, V = self._both_factors(rank, weight)
        return patterns.top_entries(U, V, d)

    def _both_factors(self, rank: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U and V for choosing entries; a factor that is not held follows from W: u_j = W v_j / s_j."""
        W = weight.double()
        inverse = bounded_inverse(self.qsvft_s, self.qsvft_rms, 0.0)[:rank, None].double()
        U = None if self.qsvft_U is None else self.qsvft_U[:rank].double()
        V = None if self.qsvft_V is None else self.qsvft_V[:rank].double()
        if U is None:
            assert V is not None
            U = inverse * (V @ W.T)
        if V is None:
            V = inverse * (U @ W)
        return U, V

    # --- what it holds ----------------------------------------------------------------------------

    def pattern(self, adapter: str) -> patterns.Pattern:
        """The pattern of an adapter."""
        pattern = self.qsvft_pattern[adapter]
        assert isinstance(pattern, patterns.Pattern)
        return pattern

    def factors(self) -> Factors:
        """The frozen factors that this layer holds."""
        return Factors(self.qsvft_U, self.qsvft_V, self.qsvft_s, self.qsvft_rms)

    def original_base(self) -> nn.Module:
        """The base layer without any merged adapter."""
        return self._unmerged[0] if self._unmerged else self.get_base_layer()

    def original_weight(self) -> Tensor:
        """The base weight (m, n) as held, dense and without merged adapters."""
        base = self.original_base()
        weight = dense_weight(base)
        return weight if weight is not None else read_through(base, self.in_features)

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base(x, *args, **kwargs)
        if self.merged:
            return self._base(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.qsvft_M]
        for name in active:
            self._check(name)
        inner = x
        for name in active:
            if self._form(name) == "input":
                inner = self._updated(name, inner, x)
        y = self._base(inner, *args, **kwargs)
        result, wx = y, None
        for name in active:
            form = self._form(name)
            if form == "output":
                wx = self._without_bias(x, y) if wx is None else wx
                result = self._updated(name, result, wx)
            elif form == "both":
                result = self._updated(name, result, x)
        return result

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def _without_bias(self, x: Tensor, y: Tensor) -> Tensor:
        """W x for the output side. y - b would do, but y was rounded where the bias may be large (Qwen's is), and
        M's gradient would read that rounding; so a layer with a bias takes a product of its own."""
        bias = getattr(self.base_layer, "bias", None)
        if not isinstance(bias, Tensor):
            return y
        wx = product_without_bias(self.base_layer, x)
        return y - bias.to(y.dtype) if wx is None else wx

    def _form(self, adapter: str) -> str:
        if self.settings[adapter].sides == "both":
            return "both"
        return small_side((self.out_features, self.in_features))

    def _updated(self, adapter: str, base: Tensor, a: Tensor) -> Tensor:
        """base plus the adapter's update of a, computed in the compute dtype (autocast's if active)."""
        kind = a.device.type
        if a.is_meta or not torch.is_autocast_enabled(kind):
            return self._apply_form(adapter, base, a)
        compute = torch.get_autocast_dtype(kind) if a.dtype == torch.float32 else a.dtype
        with torch.autocast(kind, enabled=False):
            return self._apply_form(adapter, base, a.to(compute))

    def _apply_form(self, adapter: str, base: Tensor, a: Tensor, values: Tensor | None = None) -> Tensor:
        M = self.qsvft_M[adapter] if values is None else values
        pattern, form = self.pattern(adapter), self._form(adapter)
        U, V = self._factor("qsvft_U", pattern.rank), self._factor("qsvft_V", pattern.rank)
        if form == "both":
            return two_sided_update(base, a, U, V, M, pattern)
        damping = self.settings[adapter].tail_damping
        scale = bounded_inverse(self.qsvft_s[: pattern.rank], self.qsvft_rms, damping)
        if form == "input":
            return input_side_update(base, a, V, scale, M, pattern)
        return output_side_update(base, a, U, scale, M, pattern)

    def _factor(self, name: str, rank: int) -> Tensor:
        """The first rows of a factor; an empty tensor for one that this layer's form does not hold."""
        held: Tensor | None = getattr(self, name)
        return self.qsvft_s.new_empty(0) if held is None else held[:rank]

    def _check(self, adapter: str) -> None:
        M = self.qsvft_M[adapter]
        if M.dtype != torch.float32:
            raise RuntimeError(
                f"{self.module_name}: M of adapter '{adapter}' is {M.dtype}; expected torch.float32. Something "
                "cast the trainable parameters (small steps would be lost in it). Leave the adapter out of that "
                "cast, or load the adapter again."
            )
        if adapter not in self._verified:
            self.verify(adapter)

    # --- the probe --------------------------------------------------------------------------------

    def _set_probe(self, adapter: str, weight: Tensor) -> None:
        probe = self.compute_probe(adapter, weight)
        self._expected_probe[adapter] = probe
        self.qsvft_probe[adapter] = probe.clone()
        self._verified.discard(adapter)

    @torch.no_grad()
    def compute_probe(self, adapter: str, weight: Tensor) -> Tensor:
        """Eight numbers that depend on all of dW's ingredients but M; see :mod:`qsvft.tuner.probe`."""
        if weight.is_meta:
            return weight.new_empty(SIZE, dtype=torch.float32)
        W = weight.float()
        x = fixed_noise(self.in_features, 1, W.device).float().unsqueeze(0)
        values = fixed_noise(self.pattern(adapter).count, 2, W.device).float()
        return sketch(self._apply_delta(adapter, x, values, W))

    def _apply_delta(self, adapter: str, x: Tensor, values: Tensor, W: Tensor) -> Tensor:
        """dW x in fp32 for rows x (t, n), with the factors as held."""
        form = self._form(adapter)
        if form == "input":
            return self._apply_form(adapter, torch.zeros_like(x), x, values) @ W.T
        if form == "output":
            wx = x @ W.T
            return self._apply_form(adapter, torch.zeros_like(wx), wx, values)
        return self._apply_form(adapter, x.new_zeros(x.shape[0], self.out_features), x, values)

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
                    "the same bits and quantisation settings."
                )
        self._verified.add(adapter)

    # --- merging ----------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW = U M Vᵀ (m, n) in fp32, what the forward applies, with the factors and the scale as held."""
        return self._delta(adapter, self.original_weight().float())

    def _delta(self, adapter: str, W: Tensor) -> Tensor:
        unit = torch.eye(self.in_features, device=W.device)
        return self._apply_delta(adapter, unit, self.qsvft_M[adapter].detach(), W).T

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
            self._check(name)
        original = self.original_base()
        W = self.original_weight().float()
        merged = W.clone()
        for name in (*self.merged_adapters, *names):
            merged += self._delta(name, W)
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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # --- moving -----------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> QSVFTLinear:
        """Move with the model, but keep dtypes: M stays fp32, the factors stay bf16."""
        names = ("qsvft_U", "qsvft_V", "qsvft_s", "qsvft_rms")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for base in self._unmerged:  # not a submodule, so nobody else moves it
            base._apply(fn, recurse)
        for M in self.qsvft_M.values():
            if M.grad is not None and M.grad.dtype != M.dtype:
                M.grad = M.grad.to(M.dtype)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        self._rewrap()
        return self

    def _rewrap(self) -> None:
        """Loading with assign=True or moving to another backend makes plain parameters of M."""
        for name, M in self.qsvft_M.items():
            if not isinstance(M, Float32Parameter) and M.dtype == torch.float32:
                self.qsvft_M[name] = Float32Parameter(M.data, M.requires_grad)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: PEFT's own would cast M to the compute dtype."""
        target = device if device is not None else self.qsvft_s.device
        if adapter_name in self.qsvft_M and not self.qsvft_M[adapter_name].is_meta:
            old = self.qsvft_M[adapter_name]
            self.qsvft_M[adapter_name] = Float32Parameter(old.data.to(target), old.requires_grad)
            self.qsvft_pattern[adapter_name].to(target)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _sides(config: QSVFTConfig) -> Sides:
    return "both" if config.sides == "both" else "one"
