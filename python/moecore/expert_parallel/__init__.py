"""Expert parallelism of the engine: one model on several ranks, each with a share of the experts.

Rank 0 is the caller's process. It hands requests to the ranks, tells all of them when to run a
pass, and collects what came of it. Every rank runs its own requests through an `Engine`; the passes
meet in the MoE layers, whose transport carries tokens to the experts and back. A rank without
requests takes part with no tokens of its own.

- `environment`: rank and address where a launcher (torchrun, Slurm, Ray) started the processes.
- `members`, `rendezvous`: ranks that moecore starts, and those that a launcher did; `launch`: a
  whole group, made ready.
- `channel`, `codec`: messages between rank 0 and another rank.
- `agreement`: what all ranks must have in common.
- `rank`: a rank's own model, transport and threads; `worker`: the life of a rank other than 0.
- `group`: the other ranks as rank 0 sees them; `engine`: the engine that LLM drives.
"""
