"""ResNet-18 to ResNet-101 under torchvision's names: its checkpoints load key for key.

Without arguments the picture of a flower, from scikit-learn, goes through a ResNet-50 with random weights.

    python examples/resnet.py
    python examples/resnet.py photo.jpg --weights resnet50-0676ba61.pth
    python examples/resnet.py photo.jpg --arch resnet18 --weights resnet18-f37072fd.pth
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn as nn


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: jax.Array) -> jax.Array:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))  # (N, planes, H / stride, W / stride)
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, with four times as many channels outside."""

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ):
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: jax.Array) -> jax.Array:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))  # (N, planes, H, W)
        out = self.relu(self.bn2(self.conv2(out)))  # (N, planes, H / stride, W / stride)
        out = self.bn3(self.conv3(out))  # (N, 4 planes, H / stride, W / stride)
        return self.relu(out + identity)


class ResNet(nn.Module):
    """Source: He et al., Deep residual learning for image recognition, 2016;
    ``torchvision.models.ResNet``."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int = 1000
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, 64, layers[0])
        self.layer2 = self._make_layer(block, 64 * block.expansion, 128, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 128 * block.expansion, 256, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 256 * block.expansion, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _make_layer(block, inplanes: int, planes: int, blocks: int, stride: int = 1):
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or inplanes != outplanes:
            downsample = nn.Sequential(
                conv1x1(inplanes, outplanes, stride), nn.BatchNorm2d(outplanes)
            )
        first = block(inplanes, planes, stride, downsample)
        return nn.Sequential(first, *[block(outplanes, planes) for _ in range(1, blocks)])

    def forward(self, x: jax.Array) -> jax.Array:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 3, H, W) -> (N, 64, H/2, W/2)
        x = self.maxpool(x)  # (N, 64, H/4, W/4)
        x = self.layer1(x)  # (N, 64e, H/4, W/4), e the block's expansion
        x = self.layer2(x)  # (N, 128e, H/8, W/8)
        x = self.layer3(x)  # (N, 256e, H/16, W/16)
        x = self.layer4(x)  # (N, 512e, H/32, W/32)
        x = self.avgpool(x)  # (N, 512e, 1, 1)
        return self.fc(x.reshape(x.shape[0], -1))  # (N, num_classes)


def resnet18(num_classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes)


def resnet34(num_classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes)


def resnet50(num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes)


def resnet101(num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes)


# --------------------------------------------------------------------------------------------------
# The program, which examples/vit.py and examples/convnext.py are as well


def read_image(path: str | None, size: int = 224, resize: int = 256) -> np.ndarray:
    """Return a picture as ``(1, 3, size, size)``, prepared as torchvision does for ImageNet."""
    from PIL import Image

    if path is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image("flower.jpg"))
    else:
        image = Image.open(path).convert("RGB")
    shorter = min(image.size)
    width, height = (side * resize // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    return ((pixels - mean) / std).transpose(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)


@nn.jit
def predict(model: nn.Module, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(model(images))


def classify(
    doc: str | None, archs: Mapping[str, Callable[[], nn.Module]], argv: list[str] | None = None
) -> np.ndarray:
    """Print the likeliest five classes of a picture, and return the probabilities of all."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("image", nargs="?", help="a picture; without one, a flower of scikit-learn")
    parser.add_argument("--arch", choices=archs, default=next(iter(archs)))
    parser.add_argument("--weights", metavar="FILE", help="a state dict: .pth or .safetensors")
    parser.add_argument(
        "--labels", metavar="FILE", help="a text file with the name of a class a line"
    )
    args = parser.parse_args(argv)

    start = time.perf_counter()
    if args.weights:
        with nn.device("meta"):  # shapes alone: the numbers come from the file
            model = archs[args.arch]()
        model.load_state_dict(nn.load(args.weights), assign=True)
    else:
        nn.manual_seed(0)
        model = archs[args.arch]()
        print("no --weights: these are random, and so are the classes")
    model.eval()  # running statistics instead of the batch's, no dropout
    count = sum(p.size for p in model.parameters())
    print(f"{args.arch}: {count:,} parameters, built in {time.perf_counter() - start:.1f} s")

    image = jnp.asarray(read_image(args.image))
    for call in ("first call, which compiles", "second call"):
        start = time.perf_counter()
        probabilities = np.asarray(predict(model, image))[0]
        print(f"{call}: {time.perf_counter() - start:.2f} s")
    labels = range(len(probabilities))
    if args.labels:
        labels = Path(args.labels).read_text().splitlines()
    for i in np.argsort(-probabilities)[:5]:
        print(f"{probabilities[i]:7.2%}  {labels[i]}")
    return probabilities


ARCHS = {"resnet50": resnet50, "resnet18": resnet18, "resnet34": resnet34, "resnet101": resnet101}

if __name__ == "__main__":
    classify(__doc__, ARCHS)
