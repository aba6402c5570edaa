"""What casting to float8 does to the values of each layer: how much is lost, where, and what another recipe
would lose.
"""
