# The agent, the iptables that it calls, and the certificates that Entra's is checked
# with; no shell. "make image" builds it. Both base images are used on the machine that
# builds, whatever platform the image is for: nothing of another one is run.
#
# Give base images by digest for a build that can be repeated.
ARG BUILDPLATFORM
ARG GO_IMAGE=docker.io/library/golang:1.26-bookworm
ARG DEBIAN_IMAGE=docker.io/library/debian:bookworm-slim

FROM --platform=$BUILDPLATFORM $GO_IMAGE AS build
ARG TARGETARCH
ENV GOPATH=/go PATH=/usr/local/go/bin:$PATH
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 GOARCH=$TARGETARCH go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /nmi ./cmd/nmi

FROM --platform=$BUILDPLATFORM $DEBIAN_IMAGE AS files
ARG TARGETARCH
WORKDIR /files
COPY deploy/image/files.sh /
RUN sh /files.sh "$TARGETARCH" /files
COPY --from=build /nmi usr/bin/nmi

FROM scratch
ARG VERSION=dev
ARG REVISION=
LABEL org.opencontainers.image.title="nmi" \
      org.opencontainers.image.description="Azure managed identities for Kubernetes pods" \
      org.opencontainers.image.source="https://github.com/podidentity/nmi" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=files /files /
# iptables is found by its name.
ENV PATH=/usr/sbin:/usr/bin
ENTRYPOINT ["/usr/bin/nmi"]
