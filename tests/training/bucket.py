"""A storage server that speaks Google's protocol, with an empty bucket `runs`: `python -m tests.training.bucket`.

Prints its port, and ends with its input. It is gcp-storage-emulator and what tensorstore needs beside: the generation
of an object where it is read, and writes that hold only for the generation they expect.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

read, write = objects.download, objects.insert


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, **kwargs):
    response["x-goog-generation"] = generation(storage, request.params["bucket_name"], request.params["object_id"])
    read(request, response, storage, *args, **kwargs)


def insert(request, response, storage, *args, **kwargs):
    expected, name = request.query.get("ifGenerationMatch"), request.query.get("name")
    if expected and name and expected[0] != generation(storage, request.params["bucket_name"], name[0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    write(request, response, storage, *args, **kwargs)


objects.download = download
for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
        handlers[method] = {read: download, write: insert}.get(handler, handler)

if __name__ == "__main__":
    started = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
    started.start()
    print(started._api._httpd.server_address[1], flush=True)
    sys.stdin.read()
    started.stop()
