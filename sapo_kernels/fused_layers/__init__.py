"""RMSNorm, rotary embedding and gated activation in one kernel each, in place of a model's own for a block."""
