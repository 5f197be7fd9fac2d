"""Measure head and loss, forward and backward: ours with a compiled softmax (like training on a GPU), ours with the
softmax by rows, plain PyTorch, and plain PyTorch compiled.

python -m benchmarks.lm_loss [--tokens N --width N --dtype {bf16,float32}]. The benchmark fails
if the losses differ. Figures are medians of --repeats passes after a warmup. Leave the other cores free.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import print_figures
from src import lm_loss
from src.model_configs.arguments import Parser
from src.utils.errors import exit_with
from src.utils.hardware import autocast, choose_device, describe_machine

VOCABULARY = 50_257


def main() -> None:
    parser = Parser(prog="python -m benchmarks.lm_loss", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = choose_device("auto")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, device=device, requires_grad=True)
    weight = (torch.randn(VOCABULARY, args.width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (args.tokens,), device=device)

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def measure(loss_of: Callable[..., torch.Tensor]) -> tuple[float, float]:
        """Return the median milliseconds and the loss."""
        times = []
        for _ in range(args.repeats + 1):
            hidden.grad = weight.grad = None
            _synchronize(device)
            started = time.perf_counter()
            with autocast(device, dtype):
                loss = loss_of(hidden, weight, targets)
            loss.backward()
            _synchronize(device)
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times[1:]), loss.item()

    results = {"plain": measure(plain), "compiled": measure(torch.compile(plain))}
    softmax = lm_loss.compile_softmax(partial(torch.compile, fullgraph=True, dynamic=False))
    results["ours, compiled softmax"] = measure(partial(lm_loss.linear_cross_entropy, compiled_softmax=softmax))
    for rows in (8, 16, 32, 64, 256) if device.type == "cpu" else (lm_loss.ROWS_GPU,):
        lm_loss.ROWS_CPU = lm_loss.ROWS_GPU = rows
        results[f"ours, {rows} rows"] = measure(lm_loss.linear_cross_entropy)
    losses = [loss for _, loss in results.values()]
    assert max(losses) - min(losses) < 1e-3 * losses[0], f"losses differ: {losses}"
    milliseconds = {name: round(ms, 1) for name, (ms, _) in results.items()}
    print_figures({"milliseconds": milliseconds, **vars(args), "machine": describe_machine(device)})


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    exit_with(main)
