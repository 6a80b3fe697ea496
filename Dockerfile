# The image that `agon manifests` runs: the program, its notices, and nothing else.
#   docker build --tag agon:0.1.0 .
# .ci/image builds it where a builder exists.
FROM docker.io/library/rust:1.95.0-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock rust-toolchain.toml LICENSE THIRD-PARTY-NOTICES.txt ./
COPY configs configs
COPY crates crates
COPY tests tests
RUN cargo build --locked --release --package agon

# glibc and libgcc of the same Debian release, certificates, and a user without privileges.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/agon /usr/local/bin/agon
COPY LICENSE THIRD-PARTY-NOTICES.txt /usr/share/doc/agon/
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/agon"]
