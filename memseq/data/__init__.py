"""Text data: a corpus prepared on disk, packed rows, and context models to compare with.

    settings        the keys of `config.data`
    tokens          byte values as token ids, and the document-start token
    sources         which files a corpus is made of, and how they are split
    corpus          the prepared corpus: tensorflow-datasets (array_record files, no TensorFlow)
    packing         which bytes stand in which row
    pipeline        `train_iterator` and `held_out_batches`: grain pipelines of packed rows
    context_model   order-k byte models fitted on the same training text, in bits per byte

Nothing is imported here, so that `memseq.data.tokens` costs nothing where only bytes are needed
(generation); `corpus` and `pipeline` load tensorflow-datasets and grain (extra `experiments`).
"""
