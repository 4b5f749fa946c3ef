"""All-reduce fused with residual addition and RMSNorm, over peer memory."""
