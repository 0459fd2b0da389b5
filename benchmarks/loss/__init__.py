"""The loss that is measured: workloads, who computes it, its tables."""
