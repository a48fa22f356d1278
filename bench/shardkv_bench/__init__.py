"""The load generator, and the comparison with etcd. Real processes, real time: nothing here runs in a simulation.

``workloads`` (pure) says which operations, on records that ``distributions`` choose; a driver (``shardkv_driver``,
``etcd_driver``) performs them in a ``worker`` process, which counts into a ``histogram``; ``runner`` adds workers up.
``compare`` puts both ``systems`` under the same load, ``trials`` takes single moments, ``report`` says what came of it
on this ``machine``; ``command`` is how people start it.
``local_cluster`` and ``etcd`` start and stop the servers; ``grpc_wire`` is as much gRPC as that needs.
"""
