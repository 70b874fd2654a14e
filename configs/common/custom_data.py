"""Your own data: set the paths of COCO-format files, or ``names`` to those of registered data sets.

Our tools read the number of classes from them where a config has None.
"""

from detectron2.config import LazyCall as L

from dset_d2.data.coco import coco_dataset

train_set = L(coco_dataset)(names="custom_train", json_file="", image_root="")
test_set = L(coco_dataset)(names="custom_val", json_file="", image_root="")
