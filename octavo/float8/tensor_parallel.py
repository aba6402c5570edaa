"""Tensor parallel styles whose activations travel in float8.

`torch.distributed.tensor.parallel` shards a linear's weight over a group of ranks: column-wise by output
features, row-wise by input features. Under sequence parallel the input of a column-wise linear is sharded by
tokens and gathered in front of it; that gather carries what the product reads, which here is one byte an
element instead of two.
"""
