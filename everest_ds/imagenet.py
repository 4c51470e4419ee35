"""ImageNet's statistics of RGB pixels in [0, 1], with which the official code standardises clips."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
