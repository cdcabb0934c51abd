"""Where the resident images lie, and which rectangle of them is pasted where in a batch. Integers, computed with NumPy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dali_pipeline.plan import Augment, Plan


def resident_windows(
    plan: Plan, num_images: int, augment: Augment
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each image of the plan its slot (n,), and the row and column (n, 2) at which its window starts, counted from the
    corner of the image without its border. A mirrored image is taken from the stored mirrored copy: mirroring a crop equals
    cropping the mirrored image at the mirrored column."""
    slot = plan.indices + num_images * plan.flip
    if not augment.crop:
        return slot, np.zeros((len(plan), 2), np.int64)
    column = np.where(plan.flip, 2 * augment.pad - plan.dx, plan.dx)
    return slot, np.stack([plan.dy, column], 1) - augment.pad


class StripLayout:
    """The data set as a few strips, and a batch as a few smaller ones. A strip is one tall array of pixels that holds images
    stacked on top of each other; to DALI it is one sample.

    Each resident image has a slot. Slots are numbered from the top of the first strip to the bottom of the last one; each of
    the `strips` resident strips has `stack` of them:

        a resident strip                                        a strip of a batch

        +------------------+  -+                                +------------+  -+
        | border           |   |                                | image      |   | height
        |  +------------+  |   |                                |            |   |
        |  | image      |  |   | pitch = height + 2 * border    +------------+  -+
        |  |            |  |   |                                | image      |
        |  +------------+  |   |                                |            |
        |                  |   |                                +------------+
        +------------------+  -+                                | ...        |
        | the next slot    |                                    +------------+
        | ...              |                                        width
        +------------------+                                    batch_size / strips images
          width + 2 * border

        slots 0 .. N-1      the images
        slots N .. 2N-1     the images mirrored, where the augmentation flips
        the next slot       the patch, an image of nothing but the fill colour, where the cutout is pasted (`patched`)
        the others          black, so that all strips have the same height

    A batch is made by pasting one rectangle for each image, and with `patched` a second one, from the patch, on top of it.

    `strips` is the largest divisor of the batch size up to `most_strips`.

    padded: whether black borders are stored with the images. Reflected borders always are. Black ones can be left out,
    because DALI leaves black what no rectangle covers. They are stored all the same where a window can lie wholly in the
    border, as its rectangle would be empty.
    """

    def __init__(
        self,
        num_images: int,
        height: int,
        width: int,
        batch_size: int,
        augment: Augment,
        *,
        padded: bool,
        patched: bool,
        most_strips: int,
    ) -> None:
        self._num_images = num_images
        self._augment = augment
        self._size = np.array([height, width])
        self.reflect = augment.padding_mode == "reflect"
        padded = padded or self.reflect or augment.pad >= min(height, width)
        self.border = augment.pad if augment.crop and padded else 0
        self.pitch = height + 2 * self.border  # rows from one resident image to the next
        images = num_images * (2 if augment.flip else 1)
        self.patch = images if patched and augment.cutout else None  # its slot
        self.used = images + (self.patch is not None)  # slots that hold something
        self.strips = next(n for n in range(min(most_strips, batch_size), 0, -1) if batch_size % n == 0)
        self.stack = -(-self.used // self.strips)
        self.resident_shape = (self.strips, self.stack * self.pitch, width + 2 * self.border, 3)
        images_per_strip = batch_size // self.strips
        self.batch_shape = (self.strips, images_per_strip * height, width, 3)
        # (n,) first row of each image in its strip of the batch
        self._top = np.arange(batch_size) % images_per_strip * height
        self.erases = augment.cutout > 0 and self.patch is None

    @property
    def slots(self) -> int:
        return self.strips * self.stack

    def rectangles(self, plan: Plan) -> tuple[npt.NDArray[np.int32 | np.float32], ...]:
        """The rectangles that build the plan's batch, in the form of DALI's multi_paste, (row, column) in the last axis.

        For each strip of the batch its k rectangles: the resident strip that each is taken from (strips, k); its corner there,
        its size, and its corner in the batch's strip, each (strips, k, 2). Where another operator paints the cutout
        (`erases`), also the corners and sizes of the squares to paint, each (strips, 2k) float32: row, column, row, column, ...
        """
        slot, window = resident_windows(plan, self._num_images, self._augment)
        layers = 1 if self.patch is None else 2  # what is pasted later lies on top
        ids = np.empty((len(plan), layers), np.int32)
        source, shape, target = (np.empty((len(plan), layers, 2), np.int32) for _ in range(3))

        strip, place = np.divmod(slot, self.stack)
        start = np.maximum(window, -self.border)
        ids[:, 0] = strip
        source[:, 0] = start + self.border
        source[:, 0, 0] += place * self.pitch
        shape[:, 0] = np.minimum(window + self._size, self._size + self.border) - start
        target[:, 0] = start - window
        target[:, 0, 0] += self._top

        if not self._augment.cutout:
            return self._by_strip(ids, source, shape, target)
        window = np.stack([plan.cy, plan.cx], 1) - self._augment.cutout // 2
        start = np.maximum(window, 0)
        hole = np.minimum(window + self._augment.cutout, self._size) - start
        start[:, 0] += self._top
        if self.patch is None:
            erase = (pair.astype(np.float32).reshape(self.strips, -1) for pair in (start, hole))
            return *self._by_strip(ids, source, shape, target), *erase
        ids[:, 1] = self.patch // self.stack
        source[:, 1] = (self.patch % self.stack * self.pitch, 0)
        shape[:, 1] = hole
        target[:, 1] = start
        return self._by_strip(ids, source, shape, target)

    def _by_strip(
        self, ids: npt.NDArray[np.int32], *pairs: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32 | np.float32], ...]:
        return ids.reshape(self.strips, -1), *(pair.reshape(self.strips, -1, 2) for pair in pairs)
