"""Do all processes of a job reach each other? Some all-reduces, on the network that training uses.

    torchrun --nnodes … --nproc-per-node … scripts/check_collectives.py [--mb 64] [--timeout 120]

A cable, a firewall or a driver that is wrong shows here after seconds, by machine and rank, and not as a
training that hangs. NCCL where there are GPUs, gloo elsewhere.
"""

import argparse
import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> int:
    """Reduce, compare, and let rank 0 tell how fast it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=64, help="size of what is reduced")
    parser.add_argument("--timeout", type=int, default=120, help="seconds that it may take")
    options = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=options.timeout)
        )
        tensor = torch.empty(options.mb * 250_000, device=device)
        seconds = []
        for _ in range(5):
            tensor.fill_(rank)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            wrong = (tensor != world * (world - 1) / 2).sum().item()
            if wrong:
                raise RuntimeError(f"the sum is wrong in {wrong} of {tensor.numel()} places")
    except Exception as error:
        name = f"rank {rank} on {socket.gethostname()}"
        print(f"octavo: {name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    if rank == 0:
        best = min(seconds)
        sent = 2 * (world - 1) / world * options.mb / 1000
        print(
            f"octavo: {world} processes reach each other by {dist.get_backend()}; {options.mb} MB are "
            f"all-reduced in {1000 * best:.1f} ms, {sent / best:.1f} GB/s for each",
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
