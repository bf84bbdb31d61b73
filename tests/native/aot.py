"""Compile every Triton kernel of the package ahead of time and check what the compiler made of it; needs no GPU.

    python -m tests.native.aot            # what differs from the table
    python -m tests.native.aot --write    # the same, and write the table
    python -m tests.native.aot --all      # everything, a few minutes: the table must come out as it is

Prints a row for each (kernel, shape, target, configuration) with registers, spilled bytes (NVIDIA) or registers (AMD)
and shared memory. Exits with 1 if a compilation fails, an NVIDIA kernel spills, a kernel needs more shared memory than
the part has, or a matrix loop came out without asynchronous copies (not pipelined) or tensor-core instructions. What
the GPU suite may choose among (`benchmarks.candidates`) is compiled for sm_90 too; there a complaint is a finding.

The table, aot.csv, has what came out without a complaint, and the candidates, under a digest of all that goes in: the
kernel's source and that of what it calls, its constants and options, the target and Triton's version. What stands there
is not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.candidates import candidates, in_use, label

# Shared memory of one block in KiB: CUDA programming guide, "technical specifications"; CDNA3 ISA, "LDS".
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
CONSUMER = ("sm_89", "sm_120")
TABLE = Path(__file__).with_suffix(".csv")
WIDTHS = {"kernel": 24, "shape": 28, "target": 8, "configuration": 20, "registers": 5, "spills": 4, "shared": 7}
COLUMNS = ("digest", *WIDTHS, "role", "complaint", "triton")


@dataclass(frozen=True)
class Job:
    """One compilation. shape: what the kernel's builder below takes. options: of a candidate, else those in use."""

    kernel: str
    shape: str
    target: str
    options: tuple[tuple[str, int], ...] = ()

    @property
    def capability(self) -> int:
        return int(self.target[3:]) if self.target.startswith("sm_") else 0

    def build(self):
        """(kernel, types of its arguments, constants, options)."""
        with in_use(self.kernel, dict(self.options)) if self.options else contextlib.nullcontext():
            return BUILDERS[self.kernel]([int(p) if p.isdigit() else p for p in self.shape.split()], self.capability)


def typed(**names: str) -> dict[str, str]:
    """``typed(fp32="a b")`` is {"a": "fp32", "b": "fp32"}; pointers are named ``*_ptr``."""
    return {name: f"*{t}" if "ptr" in name else t for t, listed in names.items() for name in listed.split()}


def torch_dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def attention(shape: list, capability: int, careful: bool = False):
    """shape: dtype, Dk, Dv, q heads a kv head, options ("wcslp": window, softcap, sinks, lse, past keys)."""
    from sapo_kernels.tree_attention import triton as module

    dtype, head_k, head_v, group, flags = [*shape, ""][:5]
    window, softcap, sinks = ("on" if flag in flags else None for flag in "wcs")
    wide = max(head_k, head_v)
    options = module.config(wide, torch_dtype(dtype), capability)
    sick_m = options["BLOCK_M"]
    if careful:
        options = module.careful_config(wide, torch_dtype(dtype), capability, sick_m)
    constants = module.specialise(head_k, head_v, group, window, softcap) | {"HAS_SINKS": sinks is not None}
    constants |= {"CAREFUL": careful, "SICK_M": sick_m, "WITH_LSE": "l" in flags, "HAS_PAST": "p" in flags}
    constants |= {"stride_sinks": 1}
    constants |= ({} if sinks else {"sinks_ptr": None}) | ({} if "l" in flags else {"lse_ptr": None})
    types = typed(**{dtype: "q_ptr k_ptr v_ptr out_ptr sinks_ptr"}, i64="offset_past_k offset_past_v")
    return module._tree_attention_kernel, types | typed(fp32="lse_ptr logit_scale cap_scale"), constants, options


def backward(shape: list, capability: int, what: str):
    """shape: dtype, Dk, Dv, q heads a kv head, options ("wc": window, softcap); what: "queries" or "keys"."""
    from sapo_kernels.tree_attention import triton_backward as module

    dtype, head_k, head_v, group, flags = [*shape, ""][:5]
    window, softcap = ("on" if flag in flags else None for flag in "wc")
    options = getattr(module, f"{what}_config")(max(head_k, head_v), torch_dtype(dtype), capability)
    types = typed(**{dtype: "grad_ptr q_ptr k_ptr v_ptr out_ptr dq_ptr dk_ptr dv_ptr"})
    types |= typed(fp32="lse_ptr delta_ptr part_k_ptr part_v_ptr logit_scale cap_scale scale")
    constants = module.specialise(head_k, head_v, group, window, softcap)
    if what == "keys":
        constants["KEY_TILE"] = module.KEY_TILE
    return getattr(module, f"_{what}_kernel"), types, constants, options


def sums(shape: list, capability: int):
    """shape: dtype of dK and dV."""
    from sapo_kernels.tree_attention import triton_backward as module

    types = typed(fp32="part_ptr") | typed(**{shape[0]: "sum_ptr"})
    return module._sum_kernel, types, {"KEY_TILE": module.KEY_TILE}, module.SUM


def logprob(shape: list, capability: int):
    """shape: dtype, D, options ("bcd": bias, softcap, descriptors)."""
    from sapo_kernels.linear_logprob import triton as module

    dtype, hidden, flags = [*shape, ""][:3]
    bias, softcap = ("on" if flag in flags else None for flag in "bc")
    options = module.config(hidden, torch_dtype(dtype), capability, "d" in flags)
    constants = module.specialise(hidden, bias, softcap) | {"stride_bias": 1, "DESCRIBED": "d" in flags}
    if bias is None:
        constants["bias_ptr"] = None
    types = typed(**{dtype: "bias_ptr"}, i64="targets_ptr target_ptr_ptr")
    types |= typed(fp32="max_ptr sum_ptr logit_ptr logit_scale softcap")
    for name, block in (("hidden", options["BLOCK_M"]), ("weight", options["BLOCK_V"])):
        types[name] = f"tensordesc<{dtype}[{block}, {options['BLOCK_K']}]>" if "d" in flags else f"*{dtype}"
    return module._linear_logprob_kernel, types, constants, options


def merge(shape: list, capability: int):
    from sapo_kernels.linear_logprob import triton as module

    types = typed(i64="targets_ptr target_ptr_ptr", fp32="max_ptr sum_ptr logprob_ptr lse_ptr")
    return module._merge_kernel, types, {}, {**module.MERGE_BLOCKS, "num_warps": 4}


def logprob_gradient(shape: list, capability: int):
    """shape: dtype of the inputs, options ("bc": bias, softcap)."""
    from sapo_kernels.linear_logprob import triton_backward as module

    dtype, flags = [*shape, ""][:2]
    constants = {"HAS_BIAS": "b" in flags, "HAS_SOFTCAP": "c" in flags, "stride_bias": 1}
    if "b" not in flags:
        constants["bias_ptr"] = None
    types = typed(**{dtype: "bias_ptr d_ptr"}, i64="targets_ptr target_ptr_ptr")
    types |= typed(fp32="logits_ptr lse_ptr a_ptr g_ptr logit_scale softcap d_scale")
    return module._coefficients_kernel, types, constants, module.COEFFICIENTS


def rms_norm(shape: list, capability: int):
    """shape: dtype, width."""
    from sapo_kernels.fused_layers import triton as module

    dtype, width = shape
    types = typed(**{dtype: "x_ptr weight_ptr out_ptr"}) | typed(fp32="epsilon")
    constants = {"WIDTH": width, "ROUNDED_FIRST": True, "PLUS_ONE": False}
    return module._rms_norm_kernel, types, constants, module.norm_config(width)


def gated(shape: list, capability: int):
    """shape: dtype, activation."""
    from sapo_kernels.fused_layers import triton as module

    types = typed(**{shape[0]: "gate_ptr up_ptr out_ptr"})
    return module._gated_kernel, types, {"ACTIVATION": shape[1]}, {"BLOCK": module.GATED_BLOCK, "num_warps": 4}


def rotary(shape: list, capability: int):
    """shape: dtype, q heads, k heads, D, rotated dimensions."""
    from sapo_kernels.fused_layers import triton as module

    dtype, *sizes = shape
    types = typed(**{dtype: "q_ptr k_ptr cos_ptr sin_ptr q_out_ptr k_out_ptr"})
    options = module.rotary_config(*sizes)
    warps = {"num_warps": options.pop("num_warps")}
    return module._rotary_kernel, types, options | {"ROUNDED": True}, warps


NO_PRODUCTS = ("linear_logprob gradient", "tree_attention sums", "rms_norm", "gated", "rotary")
BUILDERS = {
    "tree_attention": attention,
    "tree_attention careful": lambda *of: attention(*of, careful=True),
    "tree_attention queries": lambda *of: backward(*of, "queries"),
    "tree_attention keys": lambda *of: backward(*of, "keys"),
    "tree_attention sums": sums,
    "linear_logprob": logprob,
    "linear_logprob merge": merge,
    "linear_logprob gradient": logprob_gradient,
    "rms_norm": rms_norm,
    "gated": gated,
    "rotary": rotary,
}
BACKWARD = (
    "bf16 64 64 8 w, bf16 80 80 1, bf16 128 128 4, bf16 128 128 7 wc, bf16 192 128 8 w, bf16 256 256 2 wc, "
    "bf16 512 512 6, fp16 128 128 4 c, fp32 64 64 4 wc, fp32 128 128 4 wc, fp32 256 256 3 w, fp32 512 512 1 wc"
)
# (kernel, shapes, targets)
WORK = (
    (
        "tree_attention",
        "bf16 64 64 8 wsp, bf16 80 80 1, bf16 96 96 3 w, bf16 128 128 4, bf16 128 128 7 wcsp, bf16 128 128 5 w, "
        "bf16 192 128 1, bf16 192 128 8 ws, bf16 512 512 6, bf16 256 256 2 wc, bf16 256 256 1, fp16 128 128 4 c, "
        "fp32 64 64 4, fp32 128 128 4 wcsp, fp32 256 256 3 ws",
        TARGETS,
    ),
    ("tree_attention careful", "bf16 128 128 4 wcs, bf16 256 256 2, fp32 128 128 4", TARGETS),
    ("tree_attention queries", BACKWARD, TARGETS),
    ("tree_attention keys", BACKWARD, TARGETS),
    ("tree_attention sums", "bf16, fp32", TARGETS),
    ("linear_logprob", "bf16 4096, bf16 2304 c, bf16 2560 bc, fp16 896 c, fp32 1000 bc", TARGETS),
    ("linear_logprob merge", "", TARGETS),
    ("linear_logprob gradient", "bf16 bc, fp16, fp32 c", TARGETS),
    ("linear_logprob", "bf16 4096 d, bf16 2304 cd, fp16 2560 bcd", ("sm_90", "sm_100")),
    ("rms_norm", "bf16 128, bf16 4096, fp32 2560, bf16 16384", TARGETS),
    ("gated", "bf16 silu, fp16 gelu, fp32 gelu_tanh", TARGETS),
    ("rotary", "bf16 32 8 128 128, bf16 16 8 256 64, fp32 9 3 64 64", TARGETS),
    ("tree_attention", "bf16 128 128 7 wcsp, bf16 256 256 2 wc", CONSUMER),
    ("tree_attention queries", "bf16 128 128 7 wc, fp32 512 512 1 wc", CONSUMER),
    ("tree_attention keys", "bf16 128 128 7 wc, fp32 512 512 1 wc", CONSUMER),
    ("linear_logprob", "bf16 4096", CONSUMER),
)
# What candidates are tried on, and what their choice depends on: the width of a head, or the hidden size.
HEADS = ("tree_attention", "tree_attention queries", "tree_attention keys")
CHOSEN = {
    "bf16 128 128 4": (HEADS, 128), "bf16 64 64 2": (HEADS, 64), "bf16 4096 d": (("linear_logprob",), 4096),
}  # fmt: skip


def jobs() -> list[Job]:
    """All that is compiled, the candidates last."""
    found = [
        Job(kernel, shape, target)
        for kernel, shapes, targets in WORK for shape in shapes.split(", ") for target in targets
    ]  # fmt: skip
    return found + [
        Job(kernel, shape, "sm_90", tuple(options.items()))
        for shape, (kernels, width) in CHOSEN.items() for kernel in kernels
        for options in candidates(kernel, width, torch_dtype("bf16"), 90)[1:]
    ]  # fmt: skip


def prepared(job: Job):
    """(source, target, options) of `triton.compile`, and the row of the table with its digest and nothing compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, options = job.build()
    constants = constants | {name: value for name, value in options.items() if name.isupper()}
    launch = {name: value for name, value in options.items() if not name.isupper()} | {"enable_fp_fusion": True}
    # Aligned pointers and strides: what the launcher sees for tensors of whole models.
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*i32" if "ptr" in name else "i32")
        if name not in constants and (signature[name].startswith("*") or name.startswith(("stride_", "offset_"))):
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", job.capability, 32) if job.capability else GPUTarget("hip", job.target, 64)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    # Part of Triton's own digest, which a line above would change: of what the kernel calls, wherever it stands, too.
    for name, module in list(sys.modules.items()):
        for function in vars(module).values() if name.startswith("sapo_kernels.") else ():
            if isinstance(function, triton.JITFunction):
                function.starting_line_number = 0
    parts = f"{source.hash()} {sorted(launch.items())} {job.target} {triton.__version__}"
    row = dict.fromkeys(COLUMNS, "") | {
        "digest": hashlib.sha256(parts.encode()).hexdigest()[:16], "kernel": job.kernel, "shape": job.shape,
        "target": job.target, "configuration": label({"num_warps": 4, "num_stages": 1, **options}),
        "role": "candidate" if job.options else "in use", "triton": triton.__version__,
    }  # fmt: skip
    return source, target, launch, row


def build(job: Job) -> dict[str, str]:
    """The row of a compiled job: spills are bytes a thread on NVIDIA, registers on AMD; shared memory in bytes."""
    from triton.compiler import compile

    source, target, launch, row = prepared(job)
    try:
        done = compile(source, target=target, options=launch)
    except Exception as error:  # any failure of any compiler stage belongs in the table
        return row | {"complaint": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}

    complaints = []
    if job.capability:
        registers, spills = _cuda_usage(done.asm["cubin"])
        if spills > allowed_spills():
            complaints.append("spills")
        code = done.asm["ptx"]
        if launch.get("num_stages", 1) > 1 and "cp.async" not in code:
            complaints.append("not pipelined")
        products = job.shape and "fp32" not in job.shape and job.kernel not in NO_PRODUCTS
        if products and not re.search(r"\b(wgmma|tcgen05)\.mma|\bmma\.sync", code):
            complaints.append("no tensor cores")
    else:
        text = done.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{n}:\s*(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
    if done.metadata.shared > SHARED_KIB[job.target] * 1024:
        complaints.append(f"more than {SHARED_KIB[job.target]} KiB of shared memory")
    used = {"registers": str(registers), "spills": str(spills), "shared": str(done.metadata.shared)}
    return row | used | {"complaint": ", ".join(complaints)}


def allowed_spills() -> int:
    """Bytes a thread. The tiles are chosen for Triton 3.9; 3.6 needs two to four registers more in a few of them."""
    import triton
    from packaging.version import Version

    return 0 if Version(triton.__version__) >= Version("3.9") else 16


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local stack) of the one function in a cubin; a stack means spilled registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"{name}:(\d+)", done.stdout)[1]) for name in ("REG", "STACK"))


def read_table() -> dict[str, dict[str, str]]:
    """The rows by digest."""
    if not TABLE.exists():
        return {}
    with open(TABLE, newline="") as file:
        return {row["digest"]: row for row in csv.DictReader(file)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--all", action="store_true", help="compile everything, and fail if a row of the table differs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("tests.native.aot: unset TRITON_INTERPRET, the interpreter replaces the compiler", file=sys.stderr)
        return 2
    table, listed = read_table(), jobs()
    digests = [prepared(job)[-1]["digest"] for job in listed]
    fresh = [job for job, digest in zip(listed, digests, strict=True) if args.all or digest not in table]
    # Spawned, because forking a process that runs LLVM's threads is unsafe.
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = dict(zip(fresh, pool.map(build, fresh), strict=True))
    bad, rows = 0, []
    for job, digest in zip(listed, digests, strict=True):
        row = compiled.get(job) or table[digest]
        complaint = row["complaint"]
        if digest in table and row != table[digest]:
            complaint = f"{complaint}, not the row of the table: {table[digest]}".lstrip(", ")
        fit = not complaint or complaint == row["complaint"] and job.options
        bad += not fit
        rows += [row] if fit else []
        print(*(f"{row[name]:{width}}" for name, width in WIDTHS.items()), row["role"], complaint)
    if args.write:
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(listed)} configurations, {len(compiled)} compiled, {bad} with complaints")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
