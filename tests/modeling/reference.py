"""The slow obvious version: METHOD.md written out over a checkpoint of the published layout.

Nothing here uses the package, so that a shared mistake cannot hide. Dropout is left out.
"""

import torch
import torch.nn.functional as F


class PublishedNetwork:
    """Forward pass and losses from a published state dict; ``training`` = batch norm on batch statistics."""

    def __init__(self, state, sigma=6.0, training=False):
        self.state, self.sigma, self.training = state, sigma, training

    def conv(self, x, key, stride=1, padding=0):
        return F.conv2d(x, self.state[f"{key}.weight"], self.state.get(f"{key}.bias"), stride, padding)

    def norm(self, x, key):
        s = self.state
        if self.training:
            return F.batch_norm(x, None, None, s[f"{key}.weight"], s[f"{key}.bias"], training=True)
        mean, var = s[f"{key}.running_mean"], s[f"{key}.running_var"]
        return F.batch_norm(x, mean, var, s[f"{key}.weight"], s[f"{key}.bias"])

    def bottleneck(self, x, key, stride):
        y = self.norm(self.conv(x, f"{key}.conv1"), f"{key}.bn1").relu()
        y = self.norm(self.conv(y, f"{key}.conv2", stride, 1), f"{key}.bn2").relu()
        y = self.norm(self.conv(y, f"{key}.conv3"), f"{key}.bn3")
        if f"{key}.downsample.0.weight" in self.state:
            x = self.norm(self.conv(x, f"{key}.downsample.0", stride), f"{key}.downsample.1")
        return (x + y).relu()

    def backbone(self, x):
        x = self.norm(self.conv(x, "backbone.conv1.0", 2, 1), "backbone.conv1.1").relu()
        x = self.norm(self.conv(x, "backbone.conv1.3", 1, 1), "backbone.conv1.4").relu()
        x = self.norm(self.conv(x, "backbone.conv1.6", 1, 1), "backbone.bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        outputs = []
        for stage in range(1, 5):
            block = 0
            while f"backbone.layer{stage}.{block}.conv1.weight" in self.state:
                stride = 2 if stage > 1 and block == 0 else 1
                x = self.bottleneck(x, f"backbone.layer{stage}.{block}", stride)
                block += 1
            outputs.append(x)
        return outputs

    def pyramid(self, x):
        parts = []
        for i, side in enumerate((1, 2, 3, 6)):
            pooled = self.norm(self.conv(F.adaptive_avg_pool2d(x, side), f"ppm.stages.{i}.1"), f"ppm.stages.{i}.2")
            parts.append(F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=True))
        return self.norm(self.conv(torch.cat([*parts, x], 1), "ppm.bottleneck.0"), "ppm.bottleneck.1").relu()

    def decode(self, levels):
        def resize(x, like):
            return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

        coarsest = self.pyramid(levels[3])
        lateral = []
        for i in range(3):
            key = f"decoder.lateral_convs.{i}"
            lateral.append(self.norm(self.conv(levels[i], f"{key}.0"), f"{key}.1").relu())
        lateral[2] = lateral[2] + resize(coarsest, lateral[2])
        lateral[1] = lateral[1] + resize(lateral[2], lateral[1])
        lateral[0] = lateral[0] + resize(lateral[1], lateral[0])
        outputs = []
        for i in range(3):
            key = f"decoder.fpn_convs.{i}"
            outputs.append(self.norm(self.conv(lateral[i], f"{key}.0", 1, 1), f"{key}.1").relu())
        stack = torch.cat([outputs[0], *(resize(x, outputs[0]) for x in (outputs[1], outputs[2], coarsest))], 1)
        return self.norm(self.conv(stack, "decoder.fpn_bottleneck.0", 1, 1), "decoder.fpn_bottleneck.1").relu()

    def head(self, x, key):
        x = self.conv(x, f"{key}.0").relu()
        return self.conv(self.conv(x, f"{key}.2").relu(), f"{key}.4")

    def embed(self, x):
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = self.conv(x, "embed_proj.proj", 4).permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], self.state["embed_proj.norm.weight"], self.state["embed_proj.norm.bias"])
        return self.conv(x.permute(0, 3, 1, 2), "embed_proj.conv")

    def aggregate(self, logits, features):
        n, classes, height, width = logits.shape
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        rows, columns = rows.flatten().to(logits), columns.flatten().to(logits)
        squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
        f, s = features.flatten(2), logits.flatten(2)
        affinity = torch.softmax(torch.einsum("nda,ndb->nab", f, f), dim=1)
        weight = affinity * torch.exp(-squared / (2 * self.sigma**2))
        out = torch.einsum("nca,nab->ncb", s, weight) / (weight.sum(1, keepdim=True) + 1e-7)
        return out.view(n, classes, height, width)

    def __call__(self, x):
        """(N, 3, H, W) normalised -> segmentation and annotation logits at (H, W)."""
        decoded = self.decode(self.backbone(x))
        logits = self.aggregate(self.head(decoded, "seg_head"), self.embed(x))
        annotation = self.head(decoded.detach(), "scribble_head")
        return tuple(
            F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False) for y in (logits, annotation)
        )


def literal_losses(logits, annotation, scribble, image_classes, gamma, unannotated_weight, threshold=None):
    """METHOD sections 4 and 5 with N x C x H x W tables.

    Args:
        logits, annotation: at image size, as :class:`PublishedNetwork` returns them.
        threshold: of self-training; None while it is off.

    Returns:
        loss_seg, loss_annotation and the supervision (N, H, W).
    """
    classes = logits.shape[1]
    p, q = logits.softmax(1), annotation.softmax(1)[:, :classes]
    supervision = scribble.clone()
    if threshold is not None:
        value, label = (p.detach() * image_classes[:, :, None, None]).max(1)
        label[value < threshold] = 255
        supervision = torch.where(scribble < classes, scribble, label)
        supervision[scribble == 255] = 255
    one_hot = torch.stack([supervision == c for c in range(classes)], 1).to(p)
    weight = (one_hot * (1 - q * p) ** gamma).detach()
    per_image = (-weight * logits.log_softmax(1)).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) + 1e-7)
    class_weight = torch.ones(classes + 1).to(p)
    class_weight[-1] = unannotated_weight
    loss_annotation = F.cross_entropy(annotation, scribble, class_weight, ignore_index=255)
    return per_image.mean(), loss_annotation, supervision
