"""How one model is spread over many ranks: the mesh, ZeRO, and one `parallelize` that joins them."""
