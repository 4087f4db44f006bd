# scikit-learn's handwritten digits as image folders, written by `make demo`:
# work_dirs/demo/digits/{train,val}/{0..9}/*.png, 32 x 32 grey.
dataset_type = 'CustomDataset'
data_root = 'work_dirs/demo/digits'

# Mean and standard deviation of the training images; a grey file is read as three equal channels.
data_preprocessor = dict(num_classes=10, mean=[78.9] * 3, std=[89.0] * 3, to_rgb=True)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader

# QuantHook calibrates on this: training images, seen through the test pipeline. Images that are
# scored never choose a scale.
calib_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='train', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)

val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator
