"""Small workloads of many kinds, on which optimisers are compared at one setting each."""
