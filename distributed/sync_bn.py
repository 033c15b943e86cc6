"""Batch norm over the images of all the ranks."""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm for the ranks without a GPU, which it refuses.

    The mean and then the mean square around it are taken over the images of all the ranks, which
    may hold different numbers of them, or none.
    """

    @staticmethod
    def convert(net):
        """`net` with every batch norm replaced, by torch's own where it is on a GPU; its names, and
        the tensors behind them, stay."""
        if any(p.device.type == "cuda" for p in net.parameters()):
            return nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for parent in list(net.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    setattr(parent, name, SyncBatchNorm._of(module))
        return net

    @staticmethod
    def _of(module):
        new = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine,
                            module.track_running_stats)  # fmt: skip
        new._parameters, new._buffers = module._parameters, module._buffers
        return new.train(module.training)

    def _check_input_dim(self, x):
        if x.ndim < 2:
            raise ValueError(f"batch norm needs (batch, channels, ...), not {tuple(x.shape)}")

    def forward(self, x):
        self._check_input_dim(x)
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps
            )
        dims = [d for d in range(x.ndim) if d != 1]
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = _Sum.apply(torch.cat([x.sum(dims), count]))
        images = sums[-1].detach()  # there may be none
        count = images.clamp(min=1)
        mean = sums[:-1] / count
        shape = [1, -1] + [1] * (x.ndim - 2)
        x = x - mean.view(shape)
        var = _Sum.apply(x.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += images > 0
                weight = self.momentum
                if weight is None:  # the mean of all batches
                    weight = 1 / self.num_batches_tracked.clamp(min=1)
                weight = weight * (images > 0)
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), weight)
        x = x * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x


def average_statistics(net, world):
    """Give every rank the mean of the ranks' batch-norm statistics, each by the number of batches
    that it has counted; the same bits on all of them."""
    for norm in net.modules() if world.size > 1 else ():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            weight = norm.num_batches_tracked.to(norm.running_mean)
            total = weight.clone()
            world.all_reduce_in_order(total)
            weight = torch.where(total > 0, weight / total, 1 / world.size)
            for x in (norm.running_mean, norm.running_var):
                x *= weight
                world.all_reduce_in_order(x)


class _Sum(torch.autograd.Function):
    """The sum over the ranks: what each adds reaches the loss of all, so gradients add up too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad
