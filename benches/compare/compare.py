#!/usr/bin/env python3
"""sink-attention beside PyTorch's attention on the same device, in one Markdown table.

    python3 benches/compare/compare.py --bench target/release/sink-attention

runs `sink-attention bench` and then PyTorch (2.5 or newer, with one GPU), and prints a line for each shape, element type,
pass and implementation, the fastest first. FLOPs are counted as by `sink-attention bench`: 4 B H D for each visible pair
forward, 2.5 times that backward. PyTorch's times are the median of CUDA events around calls that include no host
transfer; its backward pass is the autograd call alone.

    --json FILE          read what `bench --json FILE` wrote, instead of running --bench
    --peers-json FILE    read what --save-peers wrote, instead of running PyTorch
    --device cpu --tiny  small shapes on the CPU, to try the script out
"""
import argparse
import json
import math
import statistics
import subprocess
import sys
import time

# name, B, H, G, N, D, window (None is full); M = N, causal.
SHAPES = [
    ("gpt-oss", 1, 64, 8, 8192, 64, None),
    ("window", 1, 64, 8, 8192, 64, 128),
    ("llama", 1, 32, 8, 8192, 128, None),
    ("seed", 1, 16, 16, 4096, 64, None),
]
TINY = [("gpt-oss", 1, 8, 2, 128, 64, None), ("window", 1, 8, 2, 128, 64, 32), ("seed", 1, 4, 4, 128, 64, None)]
PEERS = ["cudnn", "flash", "efficient", "flex", "eager"]
DTYPES = ["f16", "bf16", "f32"]
# Scores that eager attention may store, in bytes, several times over.
EAGER_BYTES = 110e9


class Unfit(Exception):
    """An implementation does not do this shape."""


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", help="the binary sink-attention")
    parser.add_argument("--bench-args", default="", help="more arguments for it, such as '--adapter H200'")
    parser.add_argument("--json", help="figures of `sink-attention bench --json`, instead of --bench")
    parser.add_argument("--peers-json", help="figures of --save-peers, instead of PyTorch")
    parser.add_argument("--save-peers", help="write PyTorch's figures to this file")
    parser.add_argument("--no-peers", action="store_true", help="sink-attention alone")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s")
    parser.add_argument("--dtypes", default="f16", help="of " + ",".join(DTYPES) + " [default: %(default)s]")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it [default: %(default)s]")
    parser.add_argument("--out", help="write the table to this file, too")
    args = parser.parse_args(argv)
    for option, known in (("peers", PEERS), ("dtypes", DTYPES), ("passes", ["forward", "backward"])):
        words = [word for word in getattr(args, option).split(",") if word]
        for word in words:
            if word not in known:
                parser.error(f"--{option}: unknown {word!r}, known: {', '.join(known)}")
        setattr(args, option, words)
    if not args.json and not args.bench:
        parser.error("one of --bench and --json is needed")
    return args


def visible_pairs(n, window):
    """Of a causal mask, with the keys of a window up to the query's own."""
    window = min(window or n, n)
    return window * (window + 1) // 2 + (n - window) * window


def flops(shape, direction):
    _, batch, heads, _, n, width, window = shape
    forward = 4.0 * batch * heads * width * visible_pairs(n, window)
    return forward if direction == "forward" else 2.5 * forward


def key(row):
    return tuple(row[name] for name in ("B", "H", "G", "M", "N", "D", "E", "window", "causal", "dtype", "pass"))


# ------------------------------------------------------------------------------------------------ sink-attention


def own_rows(report):
    """Rows of `sink-attention bench --json`."""
    rows = []
    for row in report["rows"]:
        rows.append(
            {
                "shape": row["name"],
                "B": row["batch"],
                "H": row["heads"],
                "G": row["kv_heads"],
                "M": row["seq_q"],
                "N": row["seq_k"],
                "D": row["head_dim"],
                "E": row["value_dim"],
                "window": row["window"],
                "causal": row["causal"],
                "dtype": row["dtype"],
                "pass": row["pass"],
                "implementation": "sink-attention" + (f", {row['kernel']}" if "kernel" in row else ""),
                "sinks": row["sink_logits"],
                "ms": row.get("ms"),
                "tflops": row.get("tflops"),
                "note": row["skipped"] or ("disturbed" if row["disturbed"] else ""),
            }
        )
    return rows


def run_bench(args, shapes, deadline):
    """One call for each shape, so that --tiny and the defaults go the same way; the JSON reports joined."""
    joined = None
    for name, batch, heads, kv_heads, n, width, window in shapes:
        sizes = {"batch": batch, "heads": heads, "kv-heads": kv_heads, "seq-k": n, "head-dim": width}
        command = [args.bench, "bench", "--json", "-", "--dtype", ",".join(args.dtypes), "--shape", name]
        command += [word for option, value in sizes.items() for word in (f"--{option}", str(value))]
        command += ["--window", str(window)] if window else []
        command += ["--pass", args.passes[0]] if len(args.passes) == 1 else []
        if args.device == "cpu" and not args.bench_args:
            command += ["--backend", "cpu"]
        command += args.bench_args.split()
        left = max(1, deadline - time.monotonic())
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=left)
            report = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            sys.exit(f"error: {' '.join(command)} took longer than the {left:.0f} seconds that were left")
        except OSError as error:
            sys.exit(f"error: {args.bench}: {error}")
        except ValueError:
            sys.exit(f"error: {' '.join(command)} ended with {done.returncode} and no report")
        if joined is None:
            joined = report
        else:
            joined["rows"] += report["rows"]
    return joined


# ------------------------------------------------------------------------------------------------ PyTorch


class Torch:
    """PyTorch's implementations on one device."""

    def __init__(self, args):
        import torch

        self.torch, self.args, self.cuda = torch, args, args.device == "cuda"
        self.device = torch.device(args.device)
        self.dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
        if self.cuda and not torch.cuda.is_available():
            sys.exit("error: PyTorch finds no CUDA device; --device cpu --tiny tries the script out without one")
        torch.manual_seed(0)
        # The graph of the forward pass is used for many backward passes.
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False
        torch._dynamo.config.cache_size_limit = 256

    def name(self):
        if not self.cuda:
            return f"PyTorch {self.torch.__version__}, CPU; wall clock"
        device = self.torch.cuda.get_device_name(0)
        return f"PyTorch {self.torch.__version__}, CUDA {self.torch.version.cuda}, {device}; CUDA events"

    def synchronize(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def median(self, call):
        """Milliseconds of a call."""
        call()
        self.synchronize()
        if not self.cuda:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)
        event = lambda: self.torch.cuda.Event(enable_timing=True)  # noqa: E731
        warm = time.perf_counter()
        while time.perf_counter() - warm < 0.3:
            call()
            self.synchronize()
        start, end = event(), event()
        start.record()
        call()
        end.record()
        self.synchronize()
        once = max(start.elapsed_time(end), 1e-3)
        inner = max(1, min(20, int(2.0 / once)))  # short kernels: several calls between two events
        count = max(3, min(20, int(1500 / (once * inner))))
        pairs = [(event(), event()) for _ in range(count)]
        for start, end in pairs:
            start.record()
            for _ in range(inner):
                call()
            end.record()
        self.synchronize()
        return statistics.median(start.elapsed_time(end) / inner for start, end in pairs)

    def mask(self, n, window):
        i = self.torch.arange(n, device=self.device)
        visible = i[None] <= i[:, None]
        return visible & (i[None] > i[:, None] - window) if window else visible

    def sdpa(self, backend, shape, dtype):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        _, _, heads, kv_heads, n, _, window = shape
        if backend in ("cudnn", "flash") and dtype == "f32":
            raise Unfit("no f32")
        if backend == "cudnn" and not self.cuda:
            raise Unfit("needs CUDA")
        if window and backend != "efficient":
            raise Unfit("no window")
        if backend == "efficient" and not self.cuda:
            raise Unfit("needs CUDA")
        backends = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        attend = self.torch.nn.functional.scaled_dot_product_attention
        # The memory-efficient kernel has no grouped heads: K and V are repeated, within the timed call.
        repeat = heads // kv_heads if backend == "efficient" else 1
        how = {"attn_mask": self.mask(n, window)} if window else {"is_causal": True}

        def call(q, k, v, sinks):
            if repeat > 1:
                k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            with sdpa_kernel(backends[backend]):
                return attend(q, k, v, enable_gqa=heads != kv_heads and repeat == 1, **how)

        return call, False

    def flex(self, shape, dtype):
        """FlexAttention, with the sink logits applied to its result by lse."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        try:
            from torch.nn.attention.flex_attention import AuxRequest
        except ImportError:  # before PyTorch 2.9
            AuxRequest = None
        _, _, heads, kv_heads, n, _, window = shape

        def visible(b, h, i, j):
            return (j <= i) & (j > i - window) if window else j <= i

        blocks = create_block_mask(visible, None, None, n, n, device=self.device)

        def call(q, k, v, sinks):
            how = {"block_mask": blocks, "enable_gqa": heads != kv_heads}
            if AuxRequest:
                o, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **how)
                lse = aux.lse
            else:
                o, lse = flex_attention(q, k, v, return_lse=True, **how)
            return o * self.torch.sigmoid(lse - sinks.float().view(1, -1, 1)).unsqueeze(-1).to(o.dtype)

        return (self.torch.compile(call, dynamic=False) if self.cuda else call), True

    def eager(self, shape, dtype):
        """Scores in memory, and a column for the sink logits, as Hugging Face's GPT-OSS does."""
        _, batch, heads, kv_heads, n, width, window = shape
        if batch * heads * n * n * (4 if dtype == "f32" else 2) * 5 > EAGER_BYTES:
            raise Unfit("the scores take too much memory")
        hidden = ~self.mask(n, window)

        def call(q, k, v, sinks):
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            scores = ((q @ k.transpose(-1, -2)) * width**-0.5).masked_fill(hidden, -math.inf)
            column = sinks.view(1, heads, 1, 1).expand(batch, heads, n, 1)
            return self.torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v

        return call, True

    def call(self, peer, shape, dtype):
        return getattr(self, peer)(shape, dtype) if peer in ("flex", "eager") else self.sdpa(peer, shape, dtype)

    def measure(self, peer, shape, dtype, passes):
        """Rows of one implementation."""
        torch = self.torch
        name, batch, heads, kv_heads, n, width, window = shape
        rows = []
        row = {"shape": name, "B": batch, "H": heads, "G": kv_heads, "M": n, "N": n, "D": width, "E": width}
        row |= {"window": window, "causal": True, "dtype": dtype, "implementation": NAMES[peer]}
        sinks_used, note = False, ""
        try:
            call, sinks_used = self.call(peer, shape, dtype)
            make = lambda *size: torch.randn(*size, device=self.device).to(self.dtypes[dtype])  # noqa: E731
            operands = [make(batch, heads, n, width), make(batch, kv_heads, n, width), make(batch, kv_heads, n, width)]
            operands.append(make(heads))
            if "forward" in passes:
                with torch.no_grad():
                    ms = self.median(lambda: call(*operands))
                rows.append(row | {"pass": "forward", "ms": ms})
            if "backward" in passes:
                leaves = [x.detach().requires_grad_(True) for x in operands]
                wanted = leaves if sinks_used else leaves[:3]
                o = call(*leaves)
                d_o = torch.randn_like(o)
                ms = self.median(lambda: torch.autograd.grad(o, wanted, d_o, retain_graph=True))
                rows.append(row | {"pass": "backward", "ms": ms})
        except Unfit as unfit:
            note = str(unfit)
        except (RuntimeError, ImportError, NotImplementedError) as error:
            note = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
        measured = {row["pass"] for row in rows}
        rows += [row | {"pass": direction, "ms": None, "note": note} for direction in passes if direction not in measured]
        for row in rows:
            row["sinks"] = sinks_used
            row.setdefault("note", "")
            row["tflops"] = flops(shape, row["pass"]) / row["ms"] / 1e9 if row["ms"] else None
        operands = leaves = wanted = o = d_o = None
        if self.cuda:
            torch.cuda.empty_cache()
        return rows


NAMES = {
    "cudnn": "PyTorch SDPA, cuDNN",
    "flash": "PyTorch SDPA, FlashAttention-2",
    "efficient": "PyTorch SDPA, memory-efficient",
    "flex": "PyTorch FlexAttention, sinks by lse",
    "eager": "PyTorch eager, sinks as a column",
}


def run_peers(args, shapes, deadline):
    try:
        torch = Torch(args)
    except ImportError as error:
        sys.exit(f"error: PyTorch cannot be imported ({error}); --no-peers leaves it out")
    rows = []
    for shape in shapes:
        for dtype in args.dtypes:
            for peer in args.peers:
                if time.monotonic() > deadline:
                    print(f"the time is up: {NAMES[peer]} is not measured for {shape[0]} {dtype}", file=sys.stderr)
                    continue
                rows += torch.measure(peer, shape, dtype, args.passes)
    return {"torch": torch.name(), "rows": rows}


# ------------------------------------------------------------------------------------------------ the table


def table(own, peers):
    """Markdown: a line for each implementation, those of one problem together, the fastest first."""
    rows = own_rows(own)
    if peers:
        wanted = {key(row) for row in rows}
        rows += [row for row in peers["rows"] if key(row) in wanted]
    order = {}
    for row in rows:
        order.setdefault(key(row), len(order))
    left_out = [row for row in rows if row["ms"] is None]
    rows = sorted((row for row in rows if row["ms"] is not None), key=lambda row: (order[key(row)], row["ms"]))
    where = ", ".join(word for word in (own["device"], own["driver"]) if word)
    lines = [f"sink-attention {own['version']}: {where}; {own['clock']}"]
    if peers:
        lines.append(peers["torch"])
    lines += ["", "| shape | dtype | pass | implementation | sinks | ms | TFLOP/s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        shape = f"{row['shape']}: B={row['B']} H={row['H']} G={row['G']} N={row['N']} D={row['D']}"
        shape += f" window {row['window']}" if row["window"] else ""
        mark = " \\*" if row["note"] == "disturbed" else ""
        cells = [shape, row["dtype"], row["pass"], row["implementation"], "yes" if row["sinks"] else "no"]
        cells += [f"{row['ms']:.3f}{mark}", f"{row['tflops']:.1f}" if row["tflops"] >= 1 else f"{row['tflops']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["note"] == "disturbed" for row in rows):
        lines += ["", "\\* the slowest run took over 1.5 times the fastest: measure again"]
    if left_out:
        lines += ["", "Left out:", ""]
        reasons = {}
        for row in left_out:
            where = reasons.setdefault((row["implementation"], row["note"]), [])
            where.append(f"{row['shape']} {row['dtype']} {row['pass']}")
        lines += [f"- {implementation}: {note} ({', '.join(where)})" for (implementation, note), where in reasons.items()]
    return "\n".join(lines)


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path}: {error}")


def main(argv=None):
    args = arguments(argv)
    deadline = time.monotonic() + args.budget
    shapes = TINY if args.tiny else SHAPES
    own = read(args.json) if args.json else run_bench(args, shapes, deadline)
    peers = None
    if args.peers_json:
        peers = read(args.peers_json)
    elif not args.no_peers:
        peers = run_peers(args, shapes, deadline)
    if peers and args.save_peers:
        with open(args.save_peers, "w", encoding="utf-8") as file:
            json.dump(peers, file, indent=1)
    text = table(own, peers)
    print(text)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
