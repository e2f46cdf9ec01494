"""Every key of the configuration with its default. The studies beside this file override some.

Command: none; use configs/finetune.py or another study.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults."""
    config = ConfigDict()
    # finetune | extract | traditional | ladder | adapt | ablation | ensemble | rank | find_lr |
    # paper_tables | evaluate | predict | export: a module of experiments/
    config.experiment = "finetune"
    # classify | multilabel | ordinal | segment | regress; "" = as the data say: several label
    # columns of 0 and 1 are multilabel, a mask column is segment, else classify.
    config.task = ""
    config.seed = 0  # head's init, order of the images, augmentation, dropout

    config.model = ConfigDict()
    config.model.name = "efficientnet_lite0"
    # imagenet | none | a file (.pth, .safetensors, .h5, .npz) | the folder of a finished run |
    # https://...#sha256=... | hf:owner/name
    config.model.weights = "imagenet"
    # Comma-separated expressions over names: params/stage4/.*; their stages may not be frozen.
    config.model.dont_load = ""
    config.model.keep_head = False  # also load the classifier; the classes must be the same
    config.model.in_chans = 0  # of the network's input; 0 = those of the images, 1 or 3
    config.model.image_size = 128  # pixels; images are resized to a square
    # none | equalize (histogram equalisation) | clahe, of every image before it is normalised
    config.model.contrast = "none"
    config.model.dropout = -1.0  # before the head; -1 = the network's own
    # Block i of n drops its residual with this rate times i / n; -1 = the network's own.
    config.model.drop_path = 0.0
    # segment: channels of the U-Net decoder's stages, the coarsest first, the last at the image's
    # size; where a network has fewer sizes the last ones are used.
    config.model.decoder = "128,64,32,16,8"
    config.model.auxiliary = 0.0  # weight of the loss of the auxiliary heads; 0 = without them
    config.model.compute = "float32"  # or bfloat16; parameters and statistics stay float32

    config.data = ConfigDict()
    # phantom | npz (arrays as in MedMNIST's or Keras's files) | medmnist/<flag> | folder | csv |
    # tfds/<builder>
    config.data.name = "phantom"
    # npz, csv: the file. folder: the folder. medmnist: where it lies. tfds: its data_dir
    config.data.dir = ""
    # Sets of files (folder, csv, tfds) whose decoded images are above this stream from them; an
    # .npz is always in memory, and so are the predicted masks of a segmentation's val and test. Of
    # a streamed .nii.gz each slice costs the reading of its volume: unpack such sets to .nii.
    config.data.cache_gb = 4.0
    config.data.batch_size = 32
    # Training images drawn of each class; 0 = all. Where a set has no validation split, it is
    # carved from these.
    config.data.per_class = 0
    # Part of the training images that is used, stratified, whole patients where they are known; a
    # validation split is not drawn from, also where it is carved from train first.
    config.data.train_fraction = 1.0
    config.data.seed_draw = 0  # of the draws of per_class and train_fraction
    # Comma-separated names in their order: of ordered classes from low to high, of a mask's
    # values 0, 1, ...; "" = the labels as they sort.
    config.data.classes = ""
    config.data.val_fraction = 0.15  # of train, where a set has no validation split
    # For a csv without a split column (csv_split_column=""): the part for test, or with folds = k
    # > 1 the k-th part number `fold`, from 0. Stratified, whole patients.
    config.data.test_fraction = 0.2
    config.data.folds = 0
    config.data.fold = 0
    config.data.seed_split = 0  # of that split, of val's, and of the phantom
    # Bits in use in 16-bit image files; evaluate and predict take the run's, and of the three keys
    # below it.
    config.data.bit_depth = 16
    # DICOM and NIfTI files (pip install 'medtl_jax[medical]') stand beside pictures in a folder, a
    # csv or what is predicted; a file with several images stands for all of them, file#k for the
    # k-th from 0, a folder of DICOM files for one series.
    # Grey values shown from black to white, as centre,width in the file's units: "40,400" in
    # Hounsfield units; "" = the first VOI LUT or window of a DICOM file, else the 0.5th to 99.5th
    # percentile of an image, of a NIfTI volume of all of it.
    config.data.window = ""
    config.data.plane = "axial"  # of a NIfTI volume's slices; or coronal, sagittal
    config.data.slices = 1  # 3: 2.5D, the slices before and after as first and third channel
    # Without csv_patient_column the patient of a DICOM image: PatientID | StudyInstanceUID |
    # SeriesInstanceUID | file (each file its own). Those without the element take the study's.
    config.data.dicom_patient = "PatientID"
    # Of a folder, or of a csv without csv_patient_column: a regular expression that finds the
    # patient in the name of each file, its first group or, without one, all of it:
    # "(person[0-9]+)_". "" = patients are not known, or DICOM and NIfTI files say them.
    config.data.patient_pattern = ""
    # on | off: before a training, copies across splits, labels that differ between copies, images
    # of one shade, unused range of values, borders; kept by the checksum of the data.
    config.data.audit = "on"
    # Training is refused where more than this part of val or test has a copy in an earlier split.
    config.data.audit_limit = 0.5
    config.data.csv_path_column = "path"
    config.data.csv_path_format = "{}"  # from the cell to the path: images/{}.png
    config.data.csv_split_column = "split"
    config.data.csv_label_column = "label"  # several, comma-separated: findings, or numbers
    config.data.csv_mask_column = ""  # segment: masks as images of the class of each pixel
    config.data.csv_mask_format = "{}"
    config.data.csv_mask2_format = ""  # masks of a second observer, to compare the network with
    # Reads these rows alone, as in "scanner=b" or "scanner=b,view=PA"; "" = all.
    config.data.csv_where = ""
    # Keeps patients together; "" = there is none, or DICOM and NIfTI files say it.
    config.data.csv_patient_column = ""
    config.data.phantom = ConfigDict()
    config.data.phantom.train = 900
    config.data.phantom.val = 200
    config.data.phantom.test = 400
    config.data.phantom.domain = "a"  # scanner a, b, or mixed

    config.transfer = ConfigDict()
    # A strategy of experiments/strategies.py (scratch, knn, probe, head, lpft, groups, decay, full,
    # gradual, l2sp, delta, lwf, ..., hog_svm, ...), which sets keys of this section and a few
    # others; one with an L_pre may have another alpha than its usual one: l2sp@0.1. "" = none.
    config.transfer.strategy = ""

    # Comma-separated regular expressions over the stages' names: stem, stage1 .. stageN,
    # features, aux, decoder, head (python -m medtl_jax.models lists them). Each stage belongs to
    # exactly one group; the classifier of the weights, where it is kept, goes with the stages. All
    # three empty: the first half of the stages is frozen (none for a segmentation), the rest low,
    # decoder and heads high; without pretrained weights everything is high.
    config.transfer.groups = ConfigDict()
    config.transfer.groups.frozen = ""
    config.transfer.groups.low = ""
    config.transfer.groups.high = ""

    # Gradual unfreezing: phases `share: stages that train`, as in "1: head; 1: stage7,head;
    # 2: .*". Shares are of the epochs; a stage trains in the group it has above. "" = one phase.
    config.transfer.phases = ""
    # The learning rate of each pretrained stage is that of the next one times this; 1 = off.
    config.transfer.layer_decay = 1.0
    # The head begins as a linear probe of the frozen features (LP-FT, Kumar et al. 2022).
    config.transfer.probe_first = False

    # L_total = alpha L_pre + beta L_new. L_pre: none, or one or several of l2sp, delta, lwf,
    # replay, cotuning, bss, each with a factor if wanted: "l2sp + 0.1*bss".
    config.transfer.pretrain_loss = "none"
    config.transfer.alpha = 0.0
    config.transfer.beta = 1.0
    config.transfer.alpha_schedule = "constant"  # or linear, cosine: to 0; ramp: from 0
    config.transfer.beta_schedule = "constant"
    config.transfer.temperature = 2.0  # of lwf's distillation
    # The set that the weights were trained on, for replay and to measure what is forgotten: name
    # and dir as in config.data; "" = there is none.
    config.transfer.source = ConfigDict()
    config.transfer.source.name = ""
    config.transfer.source.dir = ""

    # prefix: what the frozen first stages make of the images is computed once, kept on disk and
    # read from there; augmentation then is `views` fixed draws of each image, 0 = none.
    config.transfer.cache = "none"
    config.transfer.views = 0
    # "" = a folder of the user's caches. What nobody has used for 60 days is removed.
    config.transfer.cache_dir = ""

    # Batch norms of the stages in low and in high: train | stats (stored statistics, scale and bias
    # train) | freeze (both stay) | reestimate (train; exact statistics for every evaluation) |
    # renorm (batch renormalisation, Ioffe 2017). Frozen stages always keep both.
    config.transfer.bn = ConfigDict()
    config.transfer.bn.low = "train"
    config.transfer.bn.high = "train"
    # Flax's momentum (1 - torch's) of the running statistics in the stages that are not frozen.
    # The weights' own value (0.99 here) suits the 100,000 steps of ImageNet; a fine-tuning of a few
    # hundred steps would be evaluated with statistics that lag behind its weights.
    config.transfer.bn.momentum = 0.9
    # Limits of renorm: 1 and 0 (batch norm) up to the fraction `start` of the updates, then linear
    # to r and d at the fraction `full`.
    config.transfer.bn.renorm_r = 3.0
    config.transfer.bn.renorm_d = 5.0
    config.transfer.bn.renorm_start = 0.1
    config.transfer.bn.renorm_full = 0.5

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw | sgd | rmsprop
    config.optim.momentum = 0.9  # of sgd and rmsprop
    config.optim.warmup_epochs = 0.25
    config.optim.final_fraction = 0.0  # of the learning rate, where the cosine ends
    # discriminator: of domain.method.
    for group, rate in (("low", 5e-4), ("high", 2e-3), ("discriminator", 1e-3)):
        config.optim[group] = ConfigDict()
        config.optim[group].lr = rate
        config.optim[group].weight_decay = 1e-4
        config.optim[group].clip = 1.0  # norm of the group's gradient; 0 = off

    config.augment = ConfigDict()  # of training images; 0 = off
    # xray | ct | mri | ultrasound | fundus | dermoscopy | histology | photographs: sets all
    # transforms (mixing and RandAugment stay) but those that the command line sets, also those
    # that a study's file sets; "" = none.
    config.augment.preset = ""
    config.augment.flip_horizontal = 0.5  # probability; 0 where left and right matter
    config.augment.flip_vertical = 0.0  # probability
    config.augment.quarter_turns = 0.0  # probability of 90, 180 or 270 degrees
    config.augment.shift = 0.1  # at most this fraction of the side
    config.augment.rotate = 0.0  # at most +- these degrees
    config.augment.scale = 0.0  # factor 1 +- this
    config.augment.shear = 0.0  # along each axis, at most +- these degrees
    config.augment.crop = 0.0  # at most this part of the area is cut away, the rest enlarged
    config.augment.elastic = 0.0  # smooth displacement, at most this fraction of the side
    config.augment.brightness = 0.2  # at most +- this fraction of the full range
    config.augment.contrast = 0.3  # factor 1 +- this
    config.augment.gamma = 0.0  # exponent from 1 / (1 + this) to 1 + this
    config.augment.hue = 0.0  # colour images: at most +- this fraction of the colour circle
    config.augment.saturation = 0.0  # colour images: factor 1 +- this
    # Colour images of stained tissue: factor 1 +- this of haematoxylin, eosin and DAB, each, and
    # at most +- this in optical density.
    config.augment.stain = 0.0
    config.augment.bias_field = 0.0  # smooth shading by a factor of at most 1 + this
    config.augment.clahe = 0.0  # at most this part of the way to the CLAHE image
    config.augment.equalize = 0.0  # probability of histogram equalisation
    config.augment.blur = 0.0  # Gaussian, its sigma at most this fraction of the side
    config.augment.noise = 0.0  # Gaussian, its deviation at most this fraction of the full range
    config.augment.cutout = 0.0  # side of the hole as a fraction of the image's
    # Alpha of the Beta distribution of lambda (0.2 mixes little, 1 evenly); with both on, each
    # batch draws one of them.
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0
    # RandAugment: each image passes so many of the transforms above, flips, turns and crop aside,
    # at their strengths times randaugment_strength; 0 = each image passes all.
    config.augment.randaugment = 0
    config.augment.randaugment_strength = 1.0

    config.train = ConfigDict()
    # At least this many epochs and this many updates: a small set gets more epochs.
    config.train.epochs = 2
    config.train.min_steps = 250
    # Updates in an epoch at least: a tiny set is passed over several times before it is validated.
    config.train.epoch_steps = 0
    config.train.label_smoothing = 0.0
    config.train.class_weights = "none"  # or balanced
    config.train.sampling = "uniform"  # or balanced: each class as often as the others
    config.train.focal_gamma = 0.0  # focal loss (Lin et al. 2017); 0 = cross-entropy
    config.train.logit_adjustment = 0.0  # tau of Menon et al. 2021; 0 = off
    config.train.ordinal = "corn"  # or cumulative (cumulative link, one threshold a class)
    config.train.dice = 1.0  # segment: weight of the Dice loss beside the cross-entropy
    config.train.huber_delta = 1.0  # regress: in standard deviations of the training targets
    # Validation value that names the best epoch: loss, or a metric of the task: accuracy, auc,
    # quadratic_kappa, dice, mae (of several numbers: r2 or pearson).
    config.train.select = "loss"
    config.train.patience = 0  # stop after this many epochs without a better one; 0 = never
    config.train.ema = 0.98  # decay of a moving average of the weights to evaluate; 0 = off
    # Stochastic weight averaging: the mean of the weights over this last fraction of the updates
    # is evaluated, with exact statistics; needs train.ema=0. 0 = off.
    config.train.swa = 0.0
    config.train.devices = 0  # 0 = all: of this machine or, with --processes, of all processes
    # Each batch's gradient in so many equal parts, one after the other: the memory is that of one
    # part. Batch norms, dropout, train.dice and the losses of transfer.pretrain_loss and of
    # domain.method see each part by itself; without them the result is that of 1, up to rounding.
    config.train.accumulate = 1
    # Computes the stages' values again where their gradients are, instead of keeping them: less
    # memory for more time, the same result. On a CPU XLA undoes it; a GPU was not measured.
    config.train.remat = False
    # Runs of a study that differ by seeds and rates, weights of losses, smoothing or strengths of
    # augmentation alone may be trained as members of one program (pmap over the devices). Those of
    # a device: turns (one after the other) | vmap | scan | unroll | auto (vmap for heads on kept
    # features and on a GPU or TPU, which was not measured; on a CPU turns on several devices and
    # alone on one) | fastest (what is so in a trial at the beginning). alone = each run by itself,
    # its batches divided over the devices.
    config.train.program = "auto"

    # Adaptation to a set whose labels are not used (they only score, if it has some): the data
    # above are the source, and of the target only images are trained on.
    config.domain = ConfigDict()
    config.domain.target = ConfigDict()
    # name, dir and csv_where as in config.data, whose other keys hold for both; "" = no target. The
    # phantom as the target of a phantom is the other scanner.
    config.domain.target.name = ""
    config.domain.target.dir = ""
    config.domain.target.csv_where = ""  # both domains may be rows of one csv
    # none, or one or several of dann, cdan, cdan_e, mmd, coral, mcc, entropy, each with a factor if
    # wanted: "cdan_e + 0.1*mcc".
    config.domain.method = "none"
    # Peak of lambda, which rises as 2 / (1 + exp(-gamma p)) - 1 with the share p of the updates.
    config.domain.strength = 1.0
    config.domain.gamma = 10.0
    # Statistics that the target's images meet in batch norms: source (in evaluation; a step's
    # target batch is normalised by its own and moves none) | own (domain-specific batch norm, in
    # the stages that train and move theirs) | adabn (the source's are trained; the target's worked
    # out for every evaluation, in all stages) | auto (own with a method where some move, else
    # source).
    config.domain.bn = "auto"
    config.domain.affine = False  # with own and a method: scale and bias of each domain too
    # What dann, mmd and coral look at: "" (features), a stage, or logits.
    config.domain.reads = ""
    config.domain.width = 1024  # of the discriminator's two hidden layers
    # Names the best epoch without target labels: source (train.select on the source's validation
    # split), entropy, infomax, snd, dev.
    config.domain.select = "infomax"

    config.probe = ConfigDict()  # extract: on features of the frozen network
    config.probe.kind = "linear"  # or knn

    config.traditional = ConfigDict()  # hand-made descriptors and a classifier, without a network
    config.traditional.features = "hog"  # hog | lbp | pixels (at most 32 x 32)
    config.traditional.classifier = "svm"  # logistic | svm | forest

    config.ladder = ConfigDict()  # strategies x fractions of the labels x seeds
    config.ladder.strategies = "scratch,knn,probe,head,lpft,groups,decay,full,gradual,l2sp,delta"
    config.ladder.fractions = "0.1,1"  # of data.train_fraction, comma-separated
    config.ladder.seeds = 3  # seed, seed + 1, ...; each draws its own images
    config.ladder.reference = "full"  # the strategy that the others are compared with

    config.adapt = ConfigDict()  # methods of adaptation x seeds on one pair of source and target
    # Of experiments/adapt_methods.py: source, adabn, dsbn, dann, cdan, cdan_e, mmd, coral, mcc,
    # entropy, or sums of losses: cdan_e+mcc. What has a loss may have another peak of lambda than
    # domain.strength: dann@0.3.
    config.adapt.methods = "source,adabn,dsbn,dann,cdan_e,mmd,coral"
    config.adapt.seeds = 3  # seed, seed + 1, ...; where images are drawn, each draws its own
    config.adapt.supervised = True  # also train with the target's labels, as the upper bound

    config.ablation = ConfigDict()  # any settings x seeds on the same splits
    # JSON: keys of this config with lists of values, or names of axes with settings by label:
    # {"optim.high.lr": [0.001, 0.002], "look": {"plain": {}, "xray": {"augment.preset": "xray"}}}.
    # The first of each is the reference. What a row that sets ensemble.members predicts is the mean
    # of so many networks for each seed: its own seed, then 1000, 2000, ... more.
    config.ablation.axes = ""
    config.ablation.design = "grid"  # or one: what differs from the reference on one axis
    config.ablation.seeds = 3  # seed, seed + 1, ...; where images are drawn, each draws its own

    config.paper = ConfigDict()  # the tables of experiments/paper_tables.py
    # Networks, comma-separated name=weights, then strategies without a network.
    config.paper.networks = (
        "baseline_cnn=none,lenet5=none,alexnet=none,"
        "efficientnet_lite0=imagenet,googlenet=imagenet,vgg16_gap=imagenet"
    )
    config.paper.baselines = "hog_svm,lbp_svm,pixels_logistic,hog_forest"
    config.paper.seeds = 3  # seed, seed + 1, ...

    config.ensemble = ConfigDict()  # members of one or several networks, fused
    config.ensemble.members = 5  # of each network: seed, seed + 1, ... on the same images
    # Comma-separated name@image_size=weights, all but the name optional: "efficientnet_lite0@128,
    # googlenet@160, resnet18@112=PATH"; "" = that of config.model.
    config.ensemble.networks = ""
    # JSON: keys of the sections optim, transfer, augment, train with a value for each member of a
    # network: {"optim.high.lr": [0.001, 0.002, 0.004]}; "" = members differ by their seeds alone.
    config.ensemble.arrays = ""
    # Comma-separated, of mean, logit, weighted, vote, rank, stacking, greedy, staple; "" = all that
    # the task has.
    config.ensemble.fusions = ""
    config.ensemble.soups = True  # also networks whose weights are means of the members'

    config.rank = ConfigDict()
    # Networks and weights to score before any training, comma-separated name=weights.
    config.rank.models = "efficientnet_lite0=imagenet,efficientnet_lite0=none"

    config.find_lr = ConfigDict()
    config.find_lr.steps = 100
    config.find_lr.least = 1e-3  # factor of both groups' rates at the first step
    config.find_lr.most = 1e2  # at the last

    config.eval = ConfigDict()
    config.eval.batch_size = 64
    config.eval.resamples = 2000  # bootstrap draws behind each interval
    config.eval.target_sensitivity = 0.95  # of the second operating point; the first is Youden's
    config.eval.surface_tolerance = 2.0  # pixels, of the normalised surface distance
    # Test-time augmentation: the scores of so many views of each image are averaged, the image
    # itself and draws of the section augment (of masks flips and quarter turns, moved back, and
    # intensities but cutout). finetune and evaluate measure it: the gain stands in tta.json, the
    # averaged scores in tta.npz, and all other numbers are without it. predict writes the averaged
    # scores. 0 = off.
    config.eval.tta = 0
    # What the test metrics become under noise, blur, contrast, jpeg and bias field at five
    # severities; 25 predictions of the split.
    config.eval.corruptions = False
    config.eval.drift = True  # distance and similarity of the tuned network to the pretrained one
    config.eval.run = ""  # evaluate, predict, export: the run folder with the checkpoint
    config.eval.splits = "test"  # evaluate: comma-separated, of train, val, test
    return config
