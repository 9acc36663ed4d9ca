# PostgreSQL from Debian's package, for machines without a registry: of the official image's interface what our Compose
# file uses (POSTGRES_PASSWORD_FILE, PGDATA, a user of its own, psql and pg_isready on the PATH).
FROM debian:bookworm-slim
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends postgresql-15 \
    && rm -rf /var/lib/apt/lists/* /etc/postgresql /var/lib/postgresql/15 \
    && useradd --uid 10001 --no-create-home --home-dir /var/lib/postgresql --shell /usr/sbin/nologin database \
    && install --directory --mode 1777 /var/lib/postgresql/data /var/run/postgresql
COPY postgres-entrypoint /usr/local/bin/
ENV PATH=/usr/lib/postgresql/15/bin:$PATH \
    PGDATA=/var/lib/postgresql/data \
    LANG=C.UTF-8
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
EXPOSE 5432
ENTRYPOINT ["postgres-entrypoint"]
CMD ["postgres"]
