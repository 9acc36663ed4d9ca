# A git server over HTTP, with one repository that has a branch.
FROM debian:bookworm-slim
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends git python3 \
    && rm -rf /var/lib/apt/lists/*
RUN git config --system user.name Somebody && git config --system user.email somebody@example.com \
    && git config --system init.defaultBranch main && git config --system safe.directory '*' \
    && git init --quiet --bare /srv/git/demo.git && git init --quiet /tmp/first && cd /tmp/first \
    && git commit --quiet --allow-empty --message "Begin" && git push --quiet /srv/git/demo.git main
COPY git_http.py /srv/
CMD ["python3", "/srv/git_http.py"]
