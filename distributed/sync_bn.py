"""Batch norm over the images of all the ranks."""

import torch
import torch.distributed as dist
import torch.nn as nn


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm on CPUs, where DDP says of torch's own: "SyncBatchNorm layers only
    work with GPU modules". Ranks may hold different numbers of images, or none."""

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    @staticmethod
    def convert(net):
        """`net` with every batch norm replaced; its names, and the tensors behind them, stay."""
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for module in net.modules() if not any(p.is_cuda for p in net.parameters()) else ():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = SyncBatchNorm
        return net

    def forward(self, x):
        """Normalise x (B, C, ...) with the mean, and the mean square around it, of all ranks."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
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
                weight = weight * (images > 0).to(self.running_mean)
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), weight)
        x = x * (var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


class _Sum(torch.autograd.Function):
    """The sum over the ranks, and of its gradients. torch.distributed.nn.functional.all_reduce is
    deprecated in torch 2.14, and the function named in its place has no gradient in torch 2.6."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Sum.forward(ctx, grad)


def average_statistics(net, world):
    """Replace batch-norm statistics by their mean over the ranks, weighted with the number of
    batches that each rank has counted; the same bits on all of them."""
    for norm in net.modules() if world.size > 1 else ():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            weight = norm.num_batches_tracked.to(norm.running_mean)
            total = weight.clone()
            world.all_reduce_in_order(total)
            weight = torch.where(total > 0, weight / total, 1 / world.size)
            for x in (norm.running_mean, norm.running_var):
                x *= weight
                world.all_reduce_in_order(x)
