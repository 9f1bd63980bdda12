"""Block-scaled fp8 weights, as DeepSeek-V3 and Kimi-K2 are released: e4m3 numbers, one scale per tile of a matrix."""

import ml_dtypes
import numpy as np
from jaxtyping import Float

from models.pretrained.errors import PretrainedError
from models.pretrained.reader import Entry, Source
from models.pretrained.settings import Settings

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE = "_scale_inv"  # The scale of "x.weight" is "x.weight_scale_inv": what undoes the scaling.
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantised(
    weight: Float[np.ndarray, "O I"], scale: Float[np.ndarray, "tiles_O tiles_I"], tile: tuple[int, int]
) -> Float[np.ndarray, "O I"]:
    """`weight` (e4m3) times the scale of its tile, in float32 (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Tiles are `tile` = (rows, columns) large, counted from the first row and column; the last ones end with the matrix.
    """
    rows, columns = tile
    across = np.repeat(scale.astype(np.float32), columns, axis=1)[:, : weight.shape[1]]
    result = np.empty(weight.shape, np.float32)
    codes = weight.view(np.uint8)
    for number, factors in enumerate(across):
        strip = slice(number * rows, (number + 1) * rows)
        np.multiply(_VALUES[codes[strip]], factors, out=result[strip])
    return result


class Dequantised:
    """A `Source` whose e4m3 matrices are dequantised, their scales being used up; the others are as they were.

    They are read in float32, to be rounded once, to what the network is loaded in; `entries` give them the type that
    config.json calls the network's, which is what it is loaded in by default.

    Raises PretrainedError, naming the tensor, for one without a scale, of another rank, or with a scale of another
    shape.
    """

    def __init__(self, source: Source, tile: tuple[int, int], dtype: np.dtype) -> None:
        self.source, self.tile = source, tile
        self.entries: dict[str, Entry] = dict(source.entries)
        for name, entry in source.entries.items():
            if entry.dtype == E4M3:
                self._check(name, entry)
                self.entries[name] = entry._replace(dtype=dtype)
                del self.entries[name + SCALE]

    def read(self, name: str) -> np.ndarray:
        """The tensor; a new array where it was e4m3."""
        found = self.source.read(name)
        if found.dtype != E4M3:
            return found
        scale, file = self.source.read(name + SCALE).copy(), self.source.entries[name + SCALE].file
        if file != self.source.entries[name].file:
            self.source.release(file)
        if not np.isfinite(scale.astype(np.float32)).all():
            raise PretrainedError(f"{file}: tensor {name}{SCALE} holds numbers that are not finite: it is damaged")
        return dequantised(found, scale, self.tile)

    def release(self, file: str) -> None:
        """Lets a file go."""
        self.source.release(file)

    def _check(self, name: str, entry: Entry) -> None:
        scale = self.source.entries.get(name + SCALE)
        if scale is None:
            raise PretrainedError(f"{entry.file}: tensor {name} is in fp8 without its scale {name}{SCALE}")
        if len(entry.shape) != 2:
            raise PretrainedError(f"{entry.file}: tensor {name} is in fp8 but no matrix: {list(entry.shape)}")
        wanted = tuple(-(-size // step) for size, step in zip(entry.shape, self.tile, strict=True))
        if scale.shape != wanted or scale.dtype not in (np.float32, ml_dtypes.bfloat16):
            raise PretrainedError(
                f"{scale.file}: tensor {name}{SCALE} is {scale.dtype} {list(scale.shape)}, but {list(entry.shape)} in "
                f"tiles of {list(self.tile)} needs float32 {list(wanted)}"
            )


def opened(source: Source, hf: Settings) -> Source:
    """The tensors as they are if the config.json has no `quantization_config`, dequantised if it is block-scaled fp8.

    Raises PretrainedError for any other quantisation.
    """
    if "quantization_config" not in hf:
        return source
    quantised = hf.group("quantization_config")
    quantised.only("quant_method", "fp8", default=None)
    quantised.only("fmt", "e4m3")
    rows, columns = quantised.wholes("weight_block_size", length=2)
    if not rows * columns:
        quantised.refuse("weight_block_size", "must be two whole numbers above 0")
    return Dequantised(source, (rows, columns), np.dtype(_DTYPES[hf.text("dtype", "torch_dtype", default="bfloat16")]))
