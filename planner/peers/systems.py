"""Other systems in our language: what each holds where and does when, as a policy that our engine prices.

A peer's policy says what the system does, not how well it is written: its passes over host memory are
priced at the rate that the machine profile measured for our fused update, its matrix products at the rates
of our own kernels. Where a peer is slower than its policy, it is so by its implementation.

CPU and DRAM traffic per parameter and step that follow from what each does (bytes; gradients of `g`):

    system           casts      update   other passes          copies           sum
    ours (split)     -          24 + g   -                     2 loads x 2 + g  28 + 2 g
    slideformer      2 x (4+2)  24 + 2   -                     2 x 2 + 2        44
    zero3-offload    -          24 + 4   clip 12, refresh 6    2 x 2 + 4        54
    megatrain        -          20 + 2   clip 6, refresh 4     2.5 x 2 + 2      39

What the window holds at the turn-around, and what stays resident, is loaded (and cast) once less; so are the
last two of the four layers between MegaTrain's checkpoints in its third pass.
"""

from __future__ import annotations

from collections.abc import Callable

from slideplan.codec import Spec
from slideplan.footprint import Footprint
from slideplan.lowering.sizes import WEIGHT_BYTES
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Placement, Tier
from slideplan.policy import OtherSystem, Policy, Workload

# Defaults of DeepSpeed's ZeRO-3 configuration, in elements.
ZERO3_MAX_LIVE_PARAMETERS = 10**9
ZERO3_REDUCE_BUCKET = 5 * 10**8
# MegaTrain keeps the boundary activation of every fourth layer.
MEGATRAIN_CHECKPOINT_INTERVAL = 4


class Peer(Spec, frozen=True):
    """A system and how it schedules: `policy` spells it out for a model and workload."""

    name: str
    what: str
    policy: Callable[[ModelSpec, Workload], Policy]


def slideformer(model: ModelSpec, workload: Workload) -> Policy:
    """SlideFormer (DAC'26): fp32 master, cast by the CPU at every load; updates in backward only.

    Two GPU units, each weights and gradient of the largest module, serve all units in turn; one host
    gradient buffer of that size, one staging buffer; all boundary activations in pinned host memory
    rounded up to powers of two; one thread issues the copies of both directions. With tied embeddings
    the final norm has a slot of its own, and the vocabulary is loaded a second time for the loss.
    """
    tied_head = model.head_unit if model.tied_embeddings else None
    return Policy(
        micro_batch=workload.global_batch,
        micro_batches=1,
        window=2,
        prefetch_depth=1,
        gradient_slots=2,
        host_gradient_slots=1,
        boundary_slots=2,
        inner_slots=0,
        state_slots=0,
        state_chunks=0,
        gradient_dtype="bf16",
        kernels="eager",
        state="exact",
        gradient_norms=False,
        update_order=tuple(reversed(range(model.units))),
        units=tuple(
            Placement(
                weights=Tier.GPU if unit == tied_head else Tier.HOST,
                boundary=Tier.HOST if unit < model.layers else Tier.GPU,
            )
            for unit in range(model.units)
        ),
        other=OtherSystem(
            name="slideformer",
            master="fp32",
            staging="per_load",
            step_barrier=True,
            copy_lanes="shared",
            unit_slots="uniform",
            pinned_sizes="power_of_two",
        ),
    )


def zero3_offload(model: ModelSpec, workload: Workload) -> Policy:
    """DeepSpeed ZeRO-3 with parameters and optimizer offloaded to the CPU, on one GPU, at its defaults.

    fp32 master and moments, an fp32 gradient of every parameter and a pinned bf16 copy of all weights lie
    in RAM: 18 bytes per parameter before rounding. The optimizer starts after the whole backward: global
    norm and scaling, update, cast back into the bf16 copy; the next step waits for all of it. Up to
    stage3_max_live_parameters stay on the GPU, gradients leave in buckets of reduce_bucket_size.
    Boundary activations stay on the GPU.
    """
    layer = model.flat_elements(UnitRole.LAYER)
    window = min(model.layers, max(2, ZERO3_MAX_LIVE_PARAMETERS // layer)) if model.layers > 1 else 2
    # The bucket holds bf16 gradients; slots here hold them in fp32, as they reach the host.
    gradients = min(model.layers, max(2, ZERO3_REDUCE_BUCKET * WEIGHT_BYTES // (4 * layer)))
    return Policy(
        micro_batch=workload.global_batch,
        micro_batches=1,
        window=window,
        prefetch_depth=1,
        gradient_slots=gradients,
        host_gradient_slots=model.layers,
        boundary_slots=0,
        inner_slots=0,
        state_slots=0,
        state_chunks=0,
        gradient_dtype="fp32",
        kernels="eager",
        state="exact",
        gradient_norms=False,
        update_order=tuple(range(model.units)),
        units=tuple(Placement() for _ in range(model.units)),
        other=OtherSystem(
            name="zero3-offload",
            master="fp32",
            staging="per_update",
            step_barrier=True,
            clipping="serial",
            pinned_sizes="power_of_two",
        ),
    )


def megatrain(model: ModelSpec, workload: Workload) -> Policy:
    """MegaTrain: bf16 weights without fp32 master, fp32 moments; 14 bytes per parameter in RAM.

    Weights are kept twice, as parameters and flat for copies, with a bf16 gradient of every parameter.
    Layers stream through two templates in three passes: forward, forward once more per block of
    checkpointed layers, backward. After backward come clipping, update and re-flattening, one after
    another; the next step waits for all of it. Checkpoints stay on the GPU.
    """
    interval = min(MEGATRAIN_CHECKPOINT_INTERVAL, model.layers)
    return Policy(
        micro_batch=workload.global_batch,
        micro_batches=1,
        window=2,
        prefetch_depth=1,
        gradient_slots=2,
        host_gradient_slots=model.layers,
        boundary_slots=max(2, interval - 1) if interval > 1 else 0,
        inner_slots=0,
        state_slots=0,
        state_chunks=0,
        gradient_dtype="bf16",
        kernels="eager",
        state="exact",
        gradient_norms=False,
        update_order=tuple(range(model.units)),
        units=tuple(Placement() for _ in range(model.units)),
        other=OtherSystem(
            name="megatrain",
            master="bf16",
            staging="per_update",
            step_barrier=True,
            clipping="serial",
            checkpoint_interval=interval,
        ),
    )


PEERS = (
    Peer(name="slideformer", what="fp32 master cast at every load, update during backward", policy=slideformer),
    Peer(name="zero3-offload", what="DeepSpeed ZeRO-3, optimizer step after backward", policy=zero3_offload),
    Peer(name="megatrain", what="bf16 weights, no fp32 master, serial optimizer step", policy=megatrain),
)


def footprint(model: ModelSpec, policy: Policy, workload: Workload) -> Footprint:
    """GPU bytes beside a peer's slots, for fused (Liger) kernels under torch's caching allocator.

    Inputs x and outputs of layers are boundary slots. Per token, h = hidden, q and kv = widths, f = ffn:

        layer backward  x, norm 1, residual, norm 2 and the output's gradient          10 h
                        rotated q, k, v; FlashAttention's output and log-sum-exp       4 q + 4 kv + 4 heads
                        q and k before their norm, where there is one                  2 q + 2 kv
                        gate, up and their gradients, gradient of their product        10 f
                        and one weight gradient, of the largest parameter
        loss            x, its norm, and the gradients of both                         8 h
                        and the head's weight gradient, which the kernel allocates, and one chunk of
                        logits in bf16 and fp32

    A caching allocator hands idle boundary slots to whatever needs memory at the peak, so boundary slots of
    the GPU that one layer's backward does not read count within these bytes, not on top of them.
    """
    tokens = policy.micro_batch * workload.seq_len
    hidden, q, kv = model.hidden, model.q_width, model.kv_width
    norm_inputs = 2 * (q + kv) if model.qk_norm else 0
    layer = tokens * (10 * hidden + 4 * q + 4 * kv + 4 * model.heads + norm_inputs + 10 * model.ffn)
    layer += WEIGHT_BYTES * max(parameter.elements for parameter in model.parameters(UnitRole.LAYER))
    # Liger cuts the tokens into about vocabulary / hidden chunks, so that a chunk's logits are of the input's size.
    chunks = -(-model.vocabulary // hidden)
    chunk_tokens = min(tokens, 1 << (-(-tokens // chunks) - 1).bit_length())
    vocabulary = model.vocabulary * hidden
    loss = tokens * 8 * hidden + WEIGHT_BYTES * vocabulary + (2 + 4) * model.vocabulary * chunk_tokens
    idle_slots = policy.boundary_slots + 2 * policy.micro_batches  # the cycle, the gradient, the last layer's output
    counted = idle_slots * model.boundary_bytes(tokens)
    return Footprint(inner_bytes=0, workspace_bytes=max(0, max(layer, loss) - counted))
