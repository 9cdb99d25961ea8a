"""Training of one model on many ranks, with tensor, sequence, pipeline and data parallelism.

`plan` lays a model out on the ranks, `mesh` makes their process groups, `parallelize` builds this rank's part, and
`parallel_model` is what training works with. This package imports nothing: megatron-core and DeepSpeed take seconds,
and a mistake in the configuration is to be reported before.
"""
