"""What compiled code needs in order to save and round as eager code does."""
