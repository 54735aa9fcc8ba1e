# SPDX-License-Identifier: Apache-2.0
"""A RabbitMQ and an S3 server on this machine, for a person, the tests and the benchmarks alike.

Standard library only: `infra/dev` runs it before the product's dependencies are there.
Reading order: `ports`, `signals`, `process`, `rabbitmq`, `s3`, `packages`, `compose`, `stack`, `state`, `demo`,
`__main__`.
"""
