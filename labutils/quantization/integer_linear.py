"""Linear layers whose weights *and* activations are integers (W8A8, W4A4): int8 × int8 → int32, then two scales.

The scale of the inputs is found anew for each token ("dynamic") or fixed on calibration text ("static"). LLM.int8
(Dettmers et al. 2022, arXiv:2208.07339) keeps the few inputs with |x| ≥ 6 and their columns in floating point.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int8, Int32
from torch import Tensor, nn

from labutils.lab.layers.calibration import InputStatistics
from labutils.lab.layers.linears import Linear, linear_layers, replace_module_, weight_of
from labutils.quantization.affine import QParams, Scheme, choose_qparams, quantize

OUTLIER_THRESHOLD = 6.0


def integer_product(left: Int8[Tensor, "rows n"], right: Int8[Tensor, "out n"]) -> Int32[Tensor, "rows out"]:
    """The product left · rightᵀ of codes, summed in int32.

    CUDA asks for at least 17 rows, and PyTorch 2.13 multiplies single columns wrongly on a CPU: zeros fill both up.
    """
    rows, columns = left.shape
    if columns == 1:
        left, right = nn.functional.pad(left, (0, 1)), nn.functional.pad(right, (0, 1))
    if left.is_cuda and rows < 17:
        left = nn.functional.pad(left, (0, 0, 0, 17 - rows))
    return torch._int_mm(left, right.T)[:rows]


def llm_int8(
    x: Float[Tensor, "rows n"], weight: Float[Tensor, "out n"], *, threshold: float = OUTLIER_THRESHOLD
) -> Float[Tensor, "rows out"]:
    """The product x · Wᵀ as in LLM.int8: columns of x that reach the threshold in floats, the others by row in int8.

    >>> x, weight = torch.tensor([[100.0, 0.5]]), torch.tensor([[0.01, 1.0]])
    >>> llm_int8(x, weight).item(), round(llm_int8(x, weight, threshold=1e9).item(), 3)
    (1.5, 1.575)
    """
    outliers = (x.abs() >= threshold).any(dim=0)
    weight_codes, weight_q = _codes(weight.masked_fill(outliers, 0), Scheme())
    codes, q = _codes(x.masked_fill(outliers, 0), Scheme(granularity="token"))
    regular = integer_product(codes, weight_codes) * q.scale * weight_q.scale.T
    return regular + x[:, outliers] @ weight[:, outliers].T


class IntegerLinear(nn.Module):
    """A linear layer that keeps integer codes of its weight and multiplies integers.

    Attributes:
        codes: the weight's, one scale a row.
        input_scale: the static scale of the inputs; None chooses one for each token.
        outliers: the inputs that stay in floats; their columns are kept in `outlier_weight`.
    """

    def __init__(
        self,
        layer: Linear,
        *,
        bits: int = 8,
        input_absmax: float | None = None,
        outliers: Bool[Tensor, " n"] | None = None,
    ) -> None:
        super().__init__()
        weight = weight_of(layer).float()
        outliers = weight.new_zeros(weight.shape[1]).bool() if outliers is None else outliers
        self.out_features, self.in_features = weight.shape
        self.input_scheme = Scheme(bits=bits, granularity="token" if input_absmax is None else "tensor")
        self.input_absmax = input_absmax
        self.register_buffer("outliers", outliers.nonzero().flatten())
        self.register_buffer("outlier_weight", weight[:, outliers].clone())
        codes, qparams = _codes(weight.masked_fill(outliers, 0), Scheme(bits=bits))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", qparams.scale.flatten())
        self.bias = layer.bias

    def dequantize(self) -> Float[Tensor, "out n"]:
        """The weight that the codes stand for, with the columns that stay in floats."""
        weight = self.codes * self.scale[:, None]
        weight[:, self.outliers] = self.outlier_weight
        return weight

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch out"]:
        """Quantizes the inputs, multiplies integers, scales the sums, adds outliers and bias."""
        rows = x.flatten(0, -2).float()
        regular = rows.index_fill(1, self.outliers, 0.0)
        low = None if self.input_absmax is None else -self.input_absmax
        codes, q = _codes(regular, self.input_scheme, low=low, high=self.input_absmax)
        y = integer_product(codes, self.codes) * q.scale * self.scale
        if len(self.outliers):
            y += rows[:, self.outliers] @ self.outlier_weight.T
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def use_integers_(
    model: nn.Module,
    *,
    bits: int = 8,
    static: Mapping[str, InputStatistics] | None = None,
    outliers: Mapping[str, InputStatistics] | None = None,
    threshold: float = OUTLIER_THRESHOLD,
) -> nn.Module:
    """Replaces every linear layer but the head by an `IntegerLinear`, in place, and returns the model.

    Args:
        model: any Hugging Face model.
        bits: of weights and inputs.
        static: calibration statistics that fix one input scale for each layer; None finds a scale for each token.
        outliers: calibration statistics that say which inputs reach the threshold, of the layers that are to be
            split. LLM.int8 looks anew in every batch and keeps the whole weight in floats to that end; here only the
            columns found beforehand remain.
        threshold: of LLM.int8.
    """
    made = {}
    for name, layer in linear_layers(model):
        mask = outliers[name].absmax >= threshold if outliers is not None and name in outliers else None
        absmax = None
        if static is not None:
            kept = static[name].absmax if mask is None else static[name].absmax[~mask]
            absmax = kept.max().item()
        made[name] = IntegerLinear(layer, bits=bits, input_absmax=absmax, outliers=mask)
    for name, layer in made.items():
        replace_module_(model, name, layer)
    return model


def _codes(x: Tensor, scheme: Scheme, **limits: float | None) -> tuple[Tensor, QParams]:
    qparams = choose_qparams(x, scheme, **limits)
    return quantize(x, qparams), qparams
