"""Images a second through a whole network, and steps a second through a head, beside what the hardware can do.

    python benchmarks/training.py [--device cpu] [--seconds 3] [--out benchmarks/training.csv]

On whatever device there is. The limits are measured in the same run: the rate of a large matrix product, and of
copying memory.
A row is a training step (forward, backward, AdamW) on data that lie ready; `of matrix rate` is the share of the limit
that its
multiplications reach (forward as counted by torch, additions included, and twice that backward where it learns), `of
copy rate` the share that reading and writing weights, gradients and
AdamW's two moments alone take: near 1 the step cannot be faster, far below both it is calls and not arithmetic that
cost.
Whole networks learn with the memory they free kept for the next step, as `fit` does it on a CPU, and, for comparison,
with it handed back to the kernel.
Medians over all steps within the given seconds. The committed figures are of two CPU cores."""

import argparse, os, statistics, time
from contextlib import nullcontext
from pathlib import Path
import pandas as pd, torch
from torch.utils.flop_counter import FlopCounterMode
from hiermetric.heads.model import EmbeddingNet, Model
from hiermetric.heads.contract import create_head
from hiermetric.images.encoder import Encoder
from hiermetric.trees.taxonomy import Taxonomy
from hiermetric.running.schedules import create_optimizer, parameter_groups
from hiermetric.running.inference import kept_memory, make_accelerator


def typical(f, device: torch.device, seconds: float) -> float:
    "Median seconds of a call, after two that warm up"
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    times, end = [], time.perf_counter() + seconds
    for i in range(10**9):
        wait()
        t = time.perf_counter()
        f()
        wait()
        if i > 1:
            times.append(time.perf_counter() - t)
        if len(times) > 2 and time.perf_counter() > end:
            return statistics.median(times)


def limits(
    device: torch.device, dtype: torch.dtype, seconds: float
) -> tuple[float, float]:  # multiply-adds count twice: 1/s; bytes/s read and written
    "What the hardware can do"
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    big = torch.empty(2**28 if device.type == 'cuda' else 2**26, device=device)
    to = torch.empty_like(big)
    return 2 * n**3 / typical(lambda: torch.mm(a, b, out=out), device, seconds), 2 * big.nbytes / typical(
        lambda: to.copy_(big), device, seconds
    )


def step(model: Model, inputs: tuple, targets: torch.Tensor, acc, seconds: float) -> dict:
    "One training step, again and again"
    model.to(acc.device).train()
    inputs = tuple(o.to(acc.device) for o in inputs)
    targets = targets.to(acc.device)
    opt = create_optimizer('adamw', parameter_groups(model, 0.05), 1e-4, device=acc.device)

    def once():
        with acc.autocast():
            loss = model.head.loss(model.embed(*inputs), targets)
        loss.backward()
        opt.step()
        opt.zero_grad()

    def flops(f):
        with FlopCounterMode(display=False) as count, torch.no_grad():
            out = f()
        return (
            out,
            count.get_total_flops(),
        )  # of the forward pass alone: what it counts backward through grouped convolutions is far too much

    z, below = flops(lambda: model.encoder(*inputs)) if model.encoder else (inputs[0], 0)
    learns = model.encoder is not None and any(p.requires_grad for p in model.encoder.parameters())
    total = below * (3 if learns else 1) + 3 * flops(lambda: model.head.loss(model.embedding(z), targets))[1]
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dict(
        seconds=typical(once, acc.device, seconds), flops=total, bytes=weights * 4 * 7
    )  # read weight, gradient, two moments; write weight and both moments


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device')
    p.add_argument('--seconds', type=float, default=3.0)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    acc = make_accelerator(a.device)
    dtype = torch.bfloat16 if acc.mixed_precision == 'bf16' else torch.float32
    matrix, copy = limits(acc.device, dtype, a.seconds)
    name = (
        torch.cuda.get_device_name()
        if acc.device.type == 'cuda'
        else f'{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads'
    )
    print(
        f'{name}, {dtype}, torch {torch.__version__}: {matrix / 1e12:.3f} TFLOP/s, {copy / 1e9:.1f} GB/s; load '
        f'{os.getloadavg()[0]:.1f}',
        flush=True,
    )
    rows = []

    def note(what, batch, r):
        rows.append(
            {
                'what': what,
                'batch': batch,
                'images/s': batch / r['seconds'],
                'steps/s': 1 / r['seconds'],
                'GFLOP a step': r['flops'] / 1e9,
                'of matrix rate': r['flops'] / r['seconds'] / matrix,
                'of copy rate': r['bytes'] / r['seconds'] / copy,
                'device': name,
                'TFLOP/s': matrix / 1e12,
                'GB/s': copy / 1e9,
            }
        )
        print(
            ' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in list(rows[-1].items())[:7]),
            flush=True,
        )

    tree = Taxonomy.from_paths({f'species {i}': f'family {i // 40}/genus {i // 5}' for i in range(200)})
    batch = 256 if acc.device.type == 'cuda' else 64
    for net, size in (('efficientnet_lite0', 96), ('efficientnet_lite0', 224), ('resnet18', 96)):
        for how, frozen, memory in (
            (', memory handed back', False, nullcontext),
            ('', False, kept_memory),
            (', backbone frozen', True, kept_memory),
        ):
            encoder = Encoder(net, size, pretrained=False, channels_last=True)
            encoder.requires_grad_(not frozen)
            model = Model(
                EmbeddingNet(encoder.out_features, 512, kind='linear'),
                create_head('arcface', in_features=512, taxonomy=tree),
                encoder,
            )
            with memory(acc.device):
                note(
                    f"{net}, {size} px{how}",
                    batch,
                    step(
                        model,
                        (torch.randint(256, (batch, 3, size, size), dtype=torch.uint8),),
                        torch.tensor(tree.leaves)[torch.randint(200, (batch,))].long(),
                        acc,
                        a.seconds,
                    ),
                )
    for leaves in (200, 5000):
        tree = Taxonomy.from_paths({f'species {i}': f'family {i // 40}/genus {i // 5}' for i in range(leaves)})
        t = torch.tensor(tree.leaves)[torch.randint(leaves, (256,))].long()
        for head in ('classifier', 'arcface', 'hace', 'sphere_multi', 'sphere_hier', 'arcface_levels', 'path_softmax'):
            model = Model(EmbeddingNet(1280, 512, kind='linear'), create_head(head, in_features=512, taxonomy=tree))
            model.head.prepare(torch.randn(256, 512), t)
            note(
                f'features, {head}, {leaves:,} leaves',
                256,
                step(model, (torch.randn(256, 1280),), t, acc, a.seconds / 3),
            )
    pd.DataFrame(rows).to_csv(a.out, index=False, float_format='%.4g')


if __name__ == '__main__':
    main()
