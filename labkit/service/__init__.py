"""The service: HTTP and jobs only. Tensors are the engine's business.

    run.py         serve(): one home, one port, one key; start, ready, clean stop
    app.py         create_app(): the routes put together
    gate.py        what every request passes: id, host, key, size, log line
    errors.py      one error shape everywhere
    schemas.py     request bodies: what is offered, what is refused by name
    objects.py     the SDK's own types as the shape of all that is stored and answered
    store.py       SQLite and blobs under one home folder
    keys.py        several keys, whose request it is, what each owner may use
    paging.py      after, limit, order
    files.py       /v1/files
    uploads.py     /v1/uploads: large files in parts
    expiry.py      deletes files and uploads whose time is over
    batches.py     /v1/batches
    batch_runner.py  sends the requests of batches through the same routes, and writes the answers
    batch_files.py   a batch's requests and answers on the disk
    retries.py     requests that the SDK sends again
    jobs.py        /v1/fine_tuning/jobs
    models.py      /v1/models, aliases, which weights a name stands for
    inference.py   /v1/completions and /v1/chat/completions
    answers.py     the engine's sequences as the SDK's answers and chunks
    scheduler.py   the one thread that owns the model and batches requests
    intake.py      what a client sent, into what the engine takes: tokens, adapters
    queue.py       turns between owners: in which order jobs and answers are taken, and the places of jobs
    supervisor.py  the thread that starts, watches and restarts workers
    worker.py      a process that does jobs one after the other: validate, or train
"""
