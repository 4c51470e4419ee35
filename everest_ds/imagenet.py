"""ImageNet's mean and standard deviation of RGB pixels in [0, 1]. The official code normalises clips with them."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
