#!/usr/bin/env python3
"""Decoding beside PyTorch's attention on the same device, in one Markdown table.

    python3 benches/compare/decode.py --json FILE

reads what `sink-attention bench --decode --json FILE` wrote and runs PyTorch (2.5 or newer, with one GPU) for the same numbers of
sequences, heads and cached keys: one query of each sequence. Query heads of a group are passed as queries of their key head, as
FlashAttention does by itself: so every key is read once. GB/s count keys and values once.
"""
import argparse
import json
import sys

from compare import NAMES, Torch


def peers(torch, row, backend):
    """Milliseconds of a backend, or why there are none."""
    t = torch.torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    batch, heads, kv_heads = row["batch"], row["heads"], row["kv_heads"]
    make = lambda *size: t.randn(*size, device=torch.device).to(torch.dtypes[row["dtype"]])  # noqa: E731
    k = make(batch, kv_heads, row["seq_k"], row["head_dim"])
    v = make(batch, kv_heads, row["seq_k"], row["value_dim"])
    attend = t.nn.functional.scaled_dot_product_attention
    times = []
    for q, grouped in (
        (make(batch, kv_heads, heads // kv_heads, row["head_dim"]), False),
        (make(batch, heads, 1, row["head_dim"]), True),
    ):
        try:
            with t.no_grad(), sdpa_kernel(backends[backend]):
                times.append(torch.median(lambda: attend(q, k, v, enable_gqa=grouped)))
        except RuntimeError as error:
            note = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
    return (min(times), "") if times else (None, note)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="figures of `sink-attention bench --decode --json`")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    with open(args.json, encoding="utf-8") as file:
        own = json.load(file)
    try:
        torch = Torch(args)
    except ImportError as error:
        sys.exit(f"error: PyTorch cannot be imported ({error}); decode.py has nothing to compare with then")
    print(f"sink-attention {own['version']}: {own['device']}, {own['driver']}; {own['clock']}")
    print(torch.name())
    print("\n| B | keys | dtype | implementation | cache | us | GB/s |\n|---|---|---|---|---|---|---|")
    left_out, seen = [], {}
    for row in own["rows"]:
        shape = tuple(row[name] for name in ("batch", "heads", "kv_heads", "queries", "seq_k", "head_dim", "value_dim", "dtype"))
        seen.setdefault(shape, []).append(row)
    for shape, rows in seen.items():
        row = rows[0]
        lines = [
            (own_row["decode"]["median_us"], f"sink-attention, {own_row['tiling']}", own_row["cache"]) for own_row in rows
        ]
        for backend in ("cudnn", "flash"):
            ms, note = peers(torch, row, backend) if row["queries"] == 1 else (None, "several queries")
            if ms is None:
                left_out.append(f"- {NAMES[backend]}: {note}")
            else:
                lines.append((1e3 * ms, NAMES[backend], "contiguous"))
        size = {"f32": 4}.get(row["dtype"], 2)
        read = row["batch"] * row["kv_heads"] * row["seq_k"] * (row["head_dim"] + row["value_dim"]) * size
        for us, name, cache in sorted(lines):
            cells = [row["batch"], row["seq_k"], row["dtype"], name, cache, f"{us:.1f}", f"{read / us / 1e3:.0f}"]
            print("| " + " | ".join(map(str, cells)) + " |")
    if left_out:
        print("\nLeft out:\n")
        print("\n".join(dict.fromkeys(left_out)))


if __name__ == "__main__":
    sys.exit(main())
