"""Loss, normalisation and evaluation against NumPy, written from their definitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import make_trainer

from net.resnet import CustomResNet
from train.config import Config, changed
from train.step.evaluation import evaluate
from train.step.steps import EvalStep, TrainStep, balanced_weights
from train.step.views import VIEWS

MEAN, STD = (120.0, 100.0, 90.0), (60.0, 50.0, 40.0)


def uint8_images(count: int, seed: int = 0) -> Tensor:
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return pixels.permute(0, 3, 1, 2)


class Flatten(nn.Module):
    """A network whose logits NumPy computes easily: three channel means and their weighted sums."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :, :, :16].mean((2, 3)))  # the left half: not symmetric under a flip


def numpy_logits(net: Flatten, images: Tensor) -> np.ndarray:
    x = (images.numpy().astype(np.float64) - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
    features = x[:, :, :, :16].mean((2, 3))
    return features @ net.linear.weight.detach().numpy().T.astype(np.float64) + net.linear.bias.detach().numpy()


def numpy_losses(logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    target = np.full_like(logits, smoothing / logits.shape[1])
    target[np.arange(len(labels)), labels] += 1 - smoothing
    return -(target * log_p).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_training_loss_and_correct_count_equal_numpy(smoothing: float) -> None:
    torch.manual_seed(1)
    net, images, labels = Flatten(), uint8_images(33), torch.randint(0, 4, (33,))
    loss, correct = TrainStep(net, MEAN, STD, label_smoothing=smoothing)(images, labels)
    logits = numpy_logits(net, images)
    assert loss.item() == pytest.approx(numpy_losses(logits, labels.numpy(), smoothing).mean(), rel=1e-5)
    assert correct.item() == (logits.argmax(1) == labels.numpy()).sum()


def balanced_by_hand(labels: np.ndarray, classes: int) -> np.ndarray:
    """n / (C * n_c) for every class that occurs."""
    return np.array(
        [len(labels) / (classes * (labels == c).sum()) if (labels == c).any() else 0 for c in range(classes)]
    )


def test_balanced_weights_give_each_class_the_same_share_and_a_mean_of_one() -> None:
    labels = np.repeat([0, 1, 3], [60, 30, 10])
    found = np.array(balanced_weights(labels, 4))
    np.testing.assert_allclose(found, balanced_by_hand(labels, 4))
    np.testing.assert_allclose(np.bincount(labels, found[labels], 4), [25, 25, 0, 25])
    assert balanced_weights(np.arange(30) % 3, 3) == [1, 1, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_multiply_each_images_loss_and_its_gradient(smoothing: float) -> None:
    torch.manual_seed(4)
    net, images, labels = Flatten(), uint8_images(33), torch.randint(0, 4, (33,))
    weights = [0.5, 3.0, 0.0, 1.25]
    step = TrainStep(net, MEAN, STD, label_smoothing=smoothing, class_weights=weights)
    loss, _ = step(images, labels)
    loss.backward()
    logits, of_image = numpy_logits(net, images), np.array(weights)[labels.numpy()]
    assert loss.item() == pytest.approx((of_image * numpy_losses(logits, labels.numpy(), smoothing)).mean(), rel=1e-5)
    # the gradient of a cross-entropy by its logits is softmax - target; that by the bias is its sum over the batch
    target = np.eye(4)[labels.numpy()] * (1 - smoothing) + smoothing / 4
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert net.linear.bias.grad is not None
    wanted = (of_image[:, None] * (softmax - target)).mean(0)
    np.testing.assert_allclose(net.linear.bias.grad.numpy(), wanted, atol=1e-6)


def test_class_weights_hold_in_a_compiled_step_and_are_no_part_of_a_checkpoint() -> None:
    torch.manual_seed(5)
    net, images, labels = Flatten(), uint8_images(12), torch.randint(0, 4, (12,))
    step = TrainStep(net, MEAN, STD, class_weights=[2.0, 0.5, 1.0, 4.0])
    plain = step(images, labels)[0].item()
    step.compile(backend="aot_eager", dynamic=False)
    assert step(images, labels)[0].item() == pytest.approx(plain, rel=1e-6)
    assert set(step.state_dict()) == {"net.linear.weight", "net.linear.bias"}


def test_a_trainer_weighs_its_classes_as_the_recipe_says(quick_config: Config) -> None:
    balanced = changed(quick_config, {"optim.class_weights": "balanced", "data.validation": 0.3})
    for config in (quick_config, balanced):
        trainer = make_trainer(config)
        images, labels = next(trainer.train_loader.epoch(0))
        loss, _ = trainer.train_step(images, labels)
        with torch.no_grad():
            logits = trainer.train_step.logits(images).double().numpy()
        of_class = np.ones(10) if config is quick_config else balanced_by_hand(trainer.dataset.train.labels, 10)
        assert len(set(of_class)) > 1 or config is quick_config
        wanted = (of_class[labels.numpy()] * numpy_losses(logits, labels.numpy())).mean()
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        trainer.close()


def padded_batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(images), size):
        rows = torch.arange(start, start + size)
        valid = rows < len(images)
        rows = torch.where(valid, rows, 0)
        yield images[rows], labels[rows], valid


@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_evaluation_counts_each_image_once_whatever_the_batch(size: int) -> None:
    torch.manual_seed(2)
    net, images, labels = Flatten(), uint8_images(50), torch.randint(0, 4, (50,))
    result = evaluate(EvalStep(net, MEAN, STD), padded_batches(images, labels, size), keep_logits=True)
    logits = numpy_logits(net, images)
    (score,) = result.scores
    assert score.count == 50
    assert score.correct == (logits.argmax(1) == labels.numpy()).sum()
    assert score.loss == pytest.approx(numpy_losses(logits, labels.numpy()).mean(), rel=1e-5)
    assert result.logits is not None and result.labels is not None
    np.testing.assert_allclose(result.logits.numpy(), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.labels, labels)


def test_padding_of_nan_counts_nothing() -> None:
    class Poisoned(Flatten):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            logits[3:] = float("nan")
            return logits

    images, labels = uint8_images(5), torch.zeros(5, dtype=torch.int64)
    valid = torch.tensor([True, True, True, False, False])
    result = evaluate(EvalStep(Poisoned(), MEAN, STD), [(images, labels, valid)])
    (score,) = result.scores
    assert score.count == 3 and np.isfinite(score.loss)


def test_flip_tta_is_the_mean_of_the_image_and_its_mirror() -> None:
    torch.manual_seed(3)
    net, images, labels = Flatten(), uint8_images(20), torch.randint(0, 4, (20,))
    views = [VIEWS["plain"], VIEWS["tta"]]
    plain, flip = evaluate(EvalStep(net, MEAN, STD), padded_batches(images, labels, 8), views=views).scores
    both = (numpy_logits(net, images) + numpy_logits(net, images.flip(3))) / 2
    assert flip.loss == pytest.approx(numpy_losses(both, labels.numpy()).mean(), rel=1e-5)
    assert plain.loss == pytest.approx(numpy_losses(numpy_logits(net, images), labels.numpy()).mean(), rel=1e-5)


def test_evaluation_gives_back_the_train_mode_and_changes_no_buffer() -> None:
    net = CustomResNet(4, 2).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step = EvalStep(net, MEAN, STD)
    evaluate(step, padded_batches(uint8_images(9), torch.zeros(9, dtype=torch.int64), 4))
    assert step.training and net.training
    step.eval()
    net.train()  # as the warm-up leaves them
    evaluate(step, padded_batches(uint8_images(9), torch.zeros(9, dtype=torch.int64), 4))
    assert net.training and not step.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(EvalStep(Flatten(), MEAN, STD), [])


def test_channels_last_input_reaches_the_first_layer_channels_last() -> None:
    seen: list[Tensor] = []
    net = CustomResNet(4, 2)
    net.prep.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = uint8_images(3)
    EvalStep(net, MEAN, STD)(images)
    EvalStep(net, MEAN, STD, channels_last=False)(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert seen[1].is_contiguous()
    torch.testing.assert_close(seen[0], seen[1].to(memory_format=torch.channels_last))
