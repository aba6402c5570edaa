"""What every other room may use: errors, exit codes, logging, files. Nothing here knows of training or needs
torch.
"""
