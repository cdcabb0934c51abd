"""Where the resident images lie, and which rectangle of them goes where in a batch: integers, in NumPy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dali_pipeline.plan import Augment, Plan

MAX_PICTURES = 16  # tall pictures a batch; see TallPictures


def resident_windows(
    plan: Plan, num_images: int, augment: Augment
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each image's slot (n,) among the images followed by the mirrored images, and the (row, column) (n, 2) at which its
    window starts, counted from the image's own corner. Mirroring the cropped image is cropping the mirrored one at the
    mirrored column."""
    slot = plan.indices + num_images * plan.flip
    if not augment.crop:
        return slot, np.zeros((len(plan), 2), np.int64)
    column = np.where(plan.flip, 2 * augment.pad - plan.dx, plan.dx)
    return slot, np.stack([plan.dy, column], 1) - augment.pad


class TallPictures:
    """The data set as a few tall pictures of images stacked on top of each other, and a batch as pictures of that kind.

    Slots are counted from the top of the first picture to the bottom of the last one, `stack` of them in each of `pictures`:

        a resident picture                                      a picture of a batch

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
        +------------------+                                    batch_size / pictures images
          width + 2 * border

        slots 0 .. N-1      the images
        slots N .. 2N-1     the images mirrored, where the augmentation flips
        the next slot       the patch, an image of nothing but the fill colour, where the cutout is pasted (`patched`)
        the others          black, so that all pictures have the same height

    A batch is made by pasting one rectangle an image, and with `patched` a second one, of the patch, on top of it.

    `pictures` is the largest divisor of the batch size up to MAX_PICTURES: enough to spread a batch over a GPU's blocks, each
    thread of which searches the list of its picture's rectangles, and few enough for the bookkeeping on each to cost nothing.

    padded: whether black borders lie there. Reflected borders always do. Black ones need not, as what no rectangle
    covers is black anyway; but where a window can lie wholly in the border there would be nothing to paste, so then they do.
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
        self.pictures = next(n for n in range(min(MAX_PICTURES, batch_size), 0, -1) if batch_size % n == 0)
        self.stack = -(-self.used // self.pictures)
        self.resident_shape = (self.pictures, self.stack * self.pitch, width + 2 * self.border, 3)
        a_picture = batch_size // self.pictures
        self.batch_shape = (self.pictures, a_picture * height, width, 3)
        self._top = (
            np.arange(batch_size) % a_picture * height
        )  # (n,) first row of each image in its picture of the batch
        self.erases = augment.cutout > 0 and self.patch is None

    @property
    def slots(self) -> int:
        return self.pictures * self.stack

    def rectangles(self, plan: Plan) -> tuple[npt.NDArray[np.int32 | np.float32], ...]:
        """The rectangles that build the plan's batch, in the form of DALI's multi_paste, (row, column) in the last axis.

        Picture of the data set (pictures, k); corner there, size, and corner in the batch's picture, each (pictures, k, 2). Where
        the cutout is painted by another operator than the paste (`erases`), also the holes' corners and sizes, each
        (pictures, 2k) float32: row, column, row, column, ...
        """
        slot, window = resident_windows(plan, self._num_images, self._augment)
        layers = 1 if self.patch is None else 2  # what is pasted later lies on top
        ids = np.empty((len(plan), layers), np.int32)
        source, shape, target = (np.empty((len(plan), layers, 2), np.int32) for _ in range(3))

        picture, place = np.divmod(slot, self.stack)
        start = np.maximum(window, -self.border)
        ids[:, 0] = picture
        source[:, 0] = start + self.border
        source[:, 0, 0] += place * self.pitch
        shape[:, 0] = np.minimum(window + self._size, self._size + self.border) - start
        target[:, 0] = start - window
        target[:, 0, 0] += self._top

        if not self._augment.cutout:
            return self._by_picture(ids, source, shape, target)
        window = np.stack([plan.cy, plan.cx], 1) - self._augment.cutout // 2
        start = np.maximum(window, 0)
        hole = np.minimum(window + self._augment.cutout, self._size) - start
        start[:, 0] += self._top
        if self.patch is None:
            erase = (pair.astype(np.float32).reshape(self.pictures, -1) for pair in (start, hole))
            return *self._by_picture(ids, source, shape, target), *erase
        ids[:, 1] = self.patch // self.stack
        source[:, 1] = (self.patch % self.stack * self.pitch, 0)
        shape[:, 1] = hole
        target[:, 1] = start
        return self._by_picture(ids, source, shape, target)

    def _by_picture(
        self, ids: npt.NDArray[np.int32], *pairs: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32 | np.float32], ...]:
        return ids.reshape(self.pictures, -1), *(pair.reshape(self.pictures, -1, 2) for pair in pairs)
