"""Which of the rows that a MoE layer sees are this process's, and which process publishes at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expert_lens.engines.sglang.contract import NEWEST
from expert_lens.errors import EngineHookError, UnsupportedModelError

__all__ = ["Layout", "captured_rows", "eager_rows", "graph_rows", "graphs_fork", "refuse_unknown"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A process's place among the ranks. `replica`: of data parallelism by whole engines, beside that of attention."""

    pp_size: int
    pp_rank: int
    attn_tp_size: int
    attn_tp_rank: int
    attn_dp_size: int
    attn_dp_rank: int
    attn_cp_size: int
    replica: int

    @classmethod
    def of(cls, runner: Any) -> Layout:
        """Raises UnsupportedModelError where this release does not say which replica the process is."""
        try:
            from sglang.srt.runtime_context import get_parallel
        except ImportError:  # before 0.5.15
            from sglang.srt.layers import dp_attention

            args = runner.server_args
            by_attention = dp_attention.is_dp_attention_enabled()
            if args.dp_size > 1 and not by_attention:
                raise _untold(args.dp_size) from None
            return cls(
                pp_size=runner.pp_size,
                pp_rank=runner.pp_rank,
                attn_tp_size=dp_attention.get_attention_tp_size(),
                attn_tp_rank=dp_attention.get_attention_tp_rank(),
                attn_dp_size=args.dp_size if by_attention else 1,
                attn_dp_rank=dp_attention.get_attention_dp_rank(),
                attn_cp_size=getattr(args, "attn_cp_size", 1) or 1,
                replica=0,
            )
        here = get_parallel()
        by_attention = here.attn_dp_size > 1
        # 0.5.16 to 0.5.20 tell it in `ps`, from 0.5.22 on it is beside the other ranks.
        told = [getattr(place, "dp_rank", None) for place in (runner, getattr(runner, "ps", None), here)]
        replica = next((rank for rank in told if rank is not None), None)
        if replica is None and runner.server_args.dp_size > 1 and not by_attention:
            raise _untold(runner.server_args.dp_size)
        return cls(
            pp_size=here.pp_size,
            pp_rank=here.pp_rank,
            attn_tp_size=here.attn_tp_size,
            attn_tp_rank=here.attn_tp_rank,
            attn_dp_size=here.attn_dp_size,
            attn_dp_rank=here.attn_dp_rank,
            attn_cp_size=here.attn_cp_size,
            replica=0 if by_attention else replica or 0,
        )

    @property
    def publishing_rank(self) -> int | None:
        """The rank under which this process publishes; None if another one publishes the same.

        Tensor-parallel ranks route alike, so the first of each data-parallel rank publishes, of every pipeline stage.
        """
        if self.attn_tp_rank:
            return None
        return (self.replica * self.attn_dp_size + self.attn_dp_rank) * self.pp_size + self.pp_rank


def _untold(replicas: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{replicas} data-parallel replicas, and this release of SGLang does not tell its model which one it is. Use "
        f"--enable-dp-attention, or a release that does: 0.5.15 to {NEWEST}."
    )


def refuse_unknown(layout: Layout, args: Any, a2a_backend: Any) -> None:
    """Raises UnsupportedModelError for what would give rows that are not whole, or not those of one process.

    `args`: SGLang's server arguments; `a2a_backend`: its way from rank to rank of tokens, or "none".
    """
    device = getattr(args, "device", None) or "cuda"
    reasons = {
        f"--device {device}, which is neither cuda nor cpu": device not in ("cuda", "cpu"),
        "context-parallel ranks, each of which has a part of the tokens": layout.attn_cp_size > 1,
        f"--moe-a2a-backend {a2a_backend} over {layout.attn_tp_size} attention ranks, each of which has a part of the "
        "tokens": layout.attn_tp_size > 1 and str(a2a_backend) != "none",
        "--enable-two-batch-overlap, which runs each layer twice": getattr(args, "enable_two_batch_overlap", False),
        "--elastic-ep-backend, which may run a forward twice": getattr(args, "elastic_ep_backend", None),
        "--enable-pdmux, which runs a forward in several parts": getattr(args, "enable_pdmux", False),
        "--enable-dynamic-chunking with pipeline stages, whose trial forwards are of the first stage alone": (
            layout.pp_size > 1 and getattr(args, "enable_dynamic_chunking", False)
        ),
        "--disaggregation-decode-enable-offload-kvcache, by which requests end where nobody is told of it": (
            getattr(args, "disaggregation_decode_enable_offload_kvcache", False)
        ),
        "--kt-weight-path, where ids are changed after they were chosen": getattr(args, "kt_weight_path", None),
    }
    if found := [reason for reason, there in reasons.items() if there]:
        raise UnsupportedModelError(f"expert_lens cannot capture this yet: {'; '.join(found)}. Start without it.")


def graph_rows(num_ids: int, num_rows: int, layout: Layout) -> slice:
    """In a graph of `num_rows` rows: this process's among the `num_ids` that a MoE layer sees.

    With data-parallel attention a layer sees as many of each rank, one behind the other, unless each rank routes its
    own.

    Raises EngineHookError for another number.
    """
    if num_ids == num_rows:
        return slice(0, num_rows)
    if num_ids == num_rows * layout.attn_dp_size:
        return slice(layout.attn_dp_rank * num_rows, (layout.attn_dp_rank + 1) * num_rows)
    raise EngineHookError(
        f"a MoE layer saw {num_ids} tokens in a graph of {num_rows}, of {layout.attn_dp_size} data-parallel ranks"
    )


def graphs_fork(layout: Layout, args: Any) -> bool:
    """Whether each layer has a collective of NCCL in decode graphs, which is a branch of its own there.

    With data-parallel attention it has, and with tensor or expert parallelism unless SGLang's own all-reduce, a kernel
    like others, is on in all groups of ranks that a layer may ask. True where that cannot be told.
    """
    if layout.attn_dp_size > 1:
        return True
    if layout.attn_tp_size == 1:
        return False
    try:
        from sglang.srt.distributed import parallel_state

        groups = [parallel_state.get_tp_group(), parallel_state.get_moe_ep_group(), parallel_state.get_moe_tp_group()]
        return getattr(args, "enable_symm_mem", False) or any(
            group.world_size > 1 and group.ca_comm.disabled for group in groups
        )
    except Exception:  # another release's groups, or one without that all-reduce: the capture does not depend on it
        return True


def captured_rows() -> int | None:
    """With data-parallel attention: each rank's rows in the forward that is being captured; None if they have unlike
    ones, which stand in other places at each replay.
    """
    from sglang.srt.layers import dp_attention

    return int(dp_attention.get_local_dp_buffer_len()) if dp_attention.is_dp_max_padding() else None


def eager_rows(num_ids: int, num_padded: int, counts: Sequence[int] | None, layout: Layout) -> int:
    """In an eager forward: the first of this process's rows among the `num_ids` that a MoE layer sees.

    `num_padded`: tokens that the forward ran over here; `counts`: of each data-parallel rank, or where each routes its
    own of this one alone, if there are several.

    Raises EngineHookError for another number.
    """
    if layout.attn_dp_size == 1:
        return 0
    if counts is not None and len(counts) == layout.attn_dp_size and num_ids == sum(counts):
        return sum(counts[: layout.attn_dp_rank])
    if num_ids == num_padded or (counts is not None and [num_ids] == list(counts)):
        return 0
    raise EngineHookError(f"a MoE layer saw {num_ids} tokens in a forward of {num_padded}, of ranks with {counts}")
