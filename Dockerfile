# The agent, the iptables that it calls, and the certificates that Entra's is
# checked with.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN make build VERSION="$VERSION"

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates iptables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/bin/nmi /usr/bin/nmi
ENTRYPOINT ["/usr/bin/nmi"]
