"""grad_cam.png: which parts of an image speak for the class that the network predicts, and which for the true class.

python -m analysis.grad_cam runs/NAME --layer layer3.0 --method gradcam++ --class cat --count 16

Yellow marks the parts of the image that raise the score of the class.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from analysis.command import command, load_for
from analysis.plotting import colormaps
from analysis.predictions import Ints, Predictions, checked_predictions, prediction_options, worst_first
from analysis.run import AnalysisError, LoadedRun, class_index, nearest
from analysis.style import BLUE, GREY, VERMILLION, Pixels, Tile, draw_sheet, percent, pretty
from dali_pipeline.dataset import ImagesOnDemand
from train.screen.log import Log

# The default layers of CustomResNet. Grad-CAM weighs each channel by the mean of its gradient over all positions. That works at
# layer3, whose maps are coarse (4 x 4) but lie on the object; in earlier layers the mean mixes positions of different meaning,
# maps scatter over the background and 1 to 3% are empty. Methods that weigh each position by its own gradient are best at layer2.
# Measured on the 510 correctly classified ones of CIFAR-10's first 600 test images, with a network of width 16 (84.2%): the mean
# confidence, 0.918 on the unchanged images, after painting the map's top 15% of pixels in the mean colour (a better map lowers it
# more), and after painting all but its top 30% (a better map keeps it higher):
#
#     map                    side of the map   top 15% painted   only top 30% left
#     Grad-CAM at layer3                   4             0.630               0.594
#     Grad-CAM at layer2                   8             0.650               0.493
#     Grad-CAM at layer1                  16             0.671               0.368
#     LayerCAM at layer2                   8             0.531               0.685
#     LayerCAM at layer3                   4             0.635               0.549
#     a disc in the centre                               0.653               0.440
DEFAULT_LAYER = "layer3"
DEFAULT_LAYERS = {"layercam": "layer2", "hirescam": "layer2", "elementwise": "layer2"}
PIXELS_AT_ONCE = 64 * 32 * 32  # of the images whose maps are made at once, as memory grows with them
# the classes of pytorch_grad_cam that take a network and a layer, and give a map for a class
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "xgradcam": "XGradCAM",
    "elementwise": "GradCAMElementWise",
    "eigengradcam": "EigenGradCAM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
    "shapleycam": "ShapleyCAM",
    "eigencam": "EigenCAM",
    "kpcacam": "KPCA_CAM",
    "fem": "FEM",
}
CLASSLESS = ("eigencam", "kpcacam", "fem")  # look at the activations alone: the same map for every class

Maps = npt.NDArray[np.float32]


class GradCamUnavailable(AnalysisError):
    """pytorch_grad_cam cannot be imported."""


def method_class(method: str) -> Any:
    """The package's class. Raises AnalysisError for an unknown name, GradCamUnavailable where the import fails."""
    if method.lower() not in METHODS:
        raise AnalysisError(f"--method {method}: unknown method{nearest(method, list(METHODS))}")
    try:
        import pytorch_grad_cam
    except (ImportError, RuntimeError, AttributeError) as error:  # RuntimeError: torchvision made for another torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            "OpenCV with windows needs that library of the system, OpenCV without does not: pip uninstall opencv-python; "
            "pip install --force-reinstall opencv-python-headless"
            if "shared object file" in reason  # libGL.so.1, libgthread-2.0.so.0 and their like, in containers
            else f"torch {torch.__version__} wants the torchvision of its release: pip install --upgrade grad-cam torchvision"
        )
        raise GradCamUnavailable(f"pytorch_grad_cam does not import ({reason}); {remedy}") from None
    found = getattr(pytorch_grad_cam, METHODS[method.lower()], None)
    if found is None:
        raise AnalysisError(f"--method {method}: the installed grad-cam has none; pip install --upgrade grad-cam")
    return found


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """A module of `net` by its name. Raises AnalysisError with the nearest name."""
    modules: dict[str, nn.Module] = {known: module for known, module in net.named_modules() if known}
    if name not in modules:
        raise AnalysisError(f"--layer {name}: unknown layer{nearest(name, list(modules))}")
    return modules[name]


def normalise(images: Pixels, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32, as the training step does."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    offset = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1)
    return (x - offset) * (1 / torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))


def heat_maps(
    net: nn.Module, inputs: Tensor, targets: Sequence[int], *, layer: str | None = None, method: str = "gradcam"
) -> Maps:
    """Maps (N, H, W) in 0..1 for normalised inputs (N, 3, H, W) and one class for each. A map is all zero where nothing in the
    image speaks for the class.

    `layer` is a module's name in `net`; None takes the method's default layer of CustomResNet.

    Each map is scaled to its own largest value. The maps are computed with an fp32 copy of the network, so the network keeps its
    precision, mode, hooks and compilation. Raises AnalysisError for an unknown layer or method, or a layer whose output is
    not a map.
    """
    cam_class = method_class(method)
    layer = layer or default_layer(method)
    device = next(net.parameters()).device
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        plain = _plain_copy(net)
        chosen = find_layer(plain, layer)
        inputs = inputs.detach().to(device, torch.float32).clone()
        check_layer(plain, layer, inputs[:1])
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        # ScoreCAM and AblationCAM print a progress bar for each image
        with contextlib.redirect_stderr(io.StringIO()):
            cam = cam_class(plain, [chosen])
            try:
                wanted = [ClassifierOutputTarget(int(target)) for target in targets]
                size = max(1, PIXELS_AT_ONCE // (inputs.shape[2] * inputs.shape[3]))
                maps = [
                    cam(input_tensor=inputs[first : first + size], targets=wanted[first : first + size])
                    for first in range(0, len(inputs), size)
                ]
            finally:
                cam.activations_and_grads.release()
    return np.nan_to_num(np.concatenate(maps).astype(np.float32))


def _plain_copy(net: nn.Module) -> nn.Module:
    twin: nn.Module = copy.deepcopy(net)
    twin.float().eval().requires_grad_(True)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return twin


def check_layer(net: nn.Module, name: str, inputs: Tensor) -> None:
    """AnalysisError unless `net` has the layer and its output is (N, C, H, W) with more than one position."""
    layer = find_layer(net, name)
    shapes: list[tuple[int, ...]] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    try:
        with torch.no_grad():
            net(inputs)
    finally:
        handle.remove()
    if not shapes or len(shapes[0]) != 4 or shapes[0][2] * shapes[0][3] == 1:
        gives = f"gives {shapes[0]}" if shapes else "is not called by itself"
        raise AnalysisError(
            f"--layer {name}: {gives}, which has no height and width to draw; take {DEFAULT_LAYER} or one before it"
        )


def default_layer(method: str) -> str:
    """The layer of CustomResNet at which the method's maps are best; DEFAULT_LAYERS says why."""
    return DEFAULT_LAYERS.get(method.lower(), DEFAULT_LAYER)


def overlay(image: Pixels, heat: Maps) -> Pixels:
    """The image (H, W, 3) in grey under its map (H, W) in 0..1, from clear dark violet over green to dense yellow."""
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    colours = colormaps["viridis"](heat)[..., :3] * 255
    strength = (0.35 + 0.35 * heat)[..., None]
    mixed: Pixels = np.clip((1 - strength) * grey + strength * colours, 0, 255).round().astype(np.uint8)
    return mixed


def choose_correct(predictions: Predictions, count: int, *, label: int | None = None, seed: int = 0) -> Ints:
    """Indices of correct test images drawn at random, one of each class before a second of any."""
    drawn: Ints = np.random.default_rng(seed).permutation(np.flatnonzero(predictions.hits))
    if label is not None:
        drawn = drawn[predictions.labels[drawn] == label]
    labels = predictions.labels[drawn]
    turn = np.zeros(len(drawn), np.int64)
    for one in np.unique(labels):
        turn[labels == one] = np.arange((labels == one).sum())
    drawn = drawn[np.argsort(turn, kind="stable")][:count]
    return drawn


def draw_grad_cam(
    net: nn.Module,
    images: Pixels | ImagesOnDemand,
    predictions: Predictions,
    class_names: tuple[str, ...],
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 12,
    layer: str | None = None,
    method: str = "gradcam",
    label: int | None = None,
    seed: int = 0,
    caption: str = "",
) -> Ints:
    """Draw correctly classified and misclassified test images (N, H, W, 3) uint8, half each, and return their indices.

    Each has three tiles: the image, the map of the predicted class, and the map of the true class (of the second most likely
    class where the prediction is right).
    """
    layer = layer or default_layer(method)
    wrong = worst_first(predictions)
    if label is not None:
        wrong = wrong[predictions.labels[wrong] == label]
    wrong = wrong[: count // 2]
    right = choose_correct(
        predictions, count - len(wrong) if len(wrong) < count // 2 else count - count // 2, label=label, seed=seed
    )
    chosen = np.concatenate([right, wrong])
    second = np.where(predictions.hits, predictions.runner_up(), predictions.labels)
    if len(chosen):
        inputs = normalise(images[chosen], mean, std)
        first_maps = heat_maps(net, inputs, predictions.predicted[chosen].tolist(), layer=layer, method=method)
        second_maps = heat_maps(net, inputs, second[chosen].tolist(), layer=layer, method=method)

    def triple(place: int) -> list[Tile | None]:
        index = int(chosen[place])
        image, said, other = images[index], int(predictions.predicted[index]), int(second[index])
        sure = np.exp(predictions.log_probabilities[index])
        hit = bool(predictions.hits[index])
        word = "next" if hit else "is"
        return [
            Tile(image, ((f"is {pretty(class_names[predictions.labels[index]])}", BLUE),)),
            Tile(
                overlay(image, first_maps[place]),
                ((f"said {pretty(class_names[said])} {percent(sure[said])}", BLUE if hit else VERMILLION),),
            ),
            Tile(
                overlay(image, second_maps[place]),
                ((f"{word} {pretty(class_names[other])} {percent(sure[other])}", GREY if hit else BLUE),),
            ),
        ]

    blank: list[Tile | None] = [None, None, None]
    tiles: list[Tile | None] = []
    if len(wrong) < len(right) - 1:  # too few mistakes for a column: fill both columns with what there is
        order = list(range(len(chosen)))
        tiles = [tile for place in order for tile in triple(place)]
    else:
        for row in range(max(len(right), len(wrong))):
            tiles += triple(row) if row < len(right) else blank
            tiles += triple(len(right) + row) if row < len(wrong) else blank
    of_class = "" if label is None else f", class {class_names[label]}"
    spelled = METHODS[method.lower()].replace("GradCAM", "Grad-CAM").replace("PlusPlus", "++")
    notes = [
        "left: correct, drawn at random; right: misclassified, highest loss first"
        if len(wrong) >= len(right) - 1
        else f"correct, drawn at random{', and last the misclassified' if len(wrong) else ''}",
        "each: the image; what speaks for the answer; what speaks for the truth, or for the second choice of a correct answer",
        "yellow: most; each map is scaled to its own maximum"
        + ("; this method gives one map for all classes" if method.lower() in CLASSLESS else ""),
    ]
    draw_sheet(
        tiles,
        path,
        columns=6,
        group=3,
        title=f"Where the network looks: {spelled} at {layer}{of_class}",
        notes=notes,
        caption=caption,
        scale=max(1, round(112 / images.shape[1])),
    )
    return chosen


def draw_for(run: LoadedRun, predictions: Predictions, path: Path, **options: Any) -> Ints:
    """`draw_grad_cam` of a run's test set, with its `options` count, layer, method, label and seed."""
    facts = run.snapshot.data
    return draw_grad_cam(
        run.net,
        run.dataset.test.images_on_demand,
        predictions,
        run.class_names,
        path,
        mean=facts.mean,
        std=facts.std,
        caption=run.caption(predictions.accuracy),
        **options,
    )


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options(
        "analysis.grad_cam", "Draw grad_cam.png: where the network looks, for right and wrong answers."
    )
    options.add_argument(
        "--count", type=int, default=12, help="how many images, half of them misclassified (default: 12)"
    )
    options.add_argument(
        "--layer",
        metavar="NAME",
        help=f"any layer by its name, such as layer3.0 (default: {DEFAULT_LAYER}, or the method's own)",
    )
    options.add_argument(
        "--method", default="gradcam", metavar="NAME", help=f"one of {', '.join(METHODS)} (default: gradcam)"
    )
    options.add_argument("--class", dest="label", metavar="NAME", help="images of this true class alone")
    options.add_argument("--seed", type=int, default=0, help="of the correct images")

    def body(options: argparse.Namespace, log: Log) -> None:
        if options.count < 1:
            raise AnalysisError(f"--count {options.count}: must be at least 1")
        method_class(options.method)
        run = load_for(options, log)
        label = None if options.label is None else class_index(options.label, run.class_names)
        if options.layer is not None:
            size = (1, 3, run.snapshot.data.height, run.snapshot.data.width)
            check_layer(run.net, options.layer, torch.zeros(size, device=run.runtime.device))
        predictions, _ = checked_predictions(run, log, options.accept_difference)
        path = run.output_dir(options.output) / ("layer_cam.png" if options.method == "layercam" else "grad_cam.png")
        draw_for(
            run,
            predictions,
            path,
            count=options.count,
            layer=options.layer,
            method=options.method,
            label=label,
            seed=options.seed,
        )
        log(str(path))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
