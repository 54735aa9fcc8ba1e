# SPDX-License-Identifier: Apache-2.0
"""Runs a RabbitMQ and an S3 server on this machine, for people, tests and benchmarks.

Standard library only: `infra/dev` runs it before the product's dependencies are installed.
Reading order: `ports`, `signals`, `process`, `rabbitmq`, `s3`, `packages`, `compose`, `stack`, `state`, `demo`,
`__main__`.
"""
