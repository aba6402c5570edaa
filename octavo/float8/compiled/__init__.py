"""What compiled code needs, so that it saves and rounds as eager code does."""
