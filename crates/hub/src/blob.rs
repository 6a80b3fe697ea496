//! Content of one file in the cache: a blob named by its ETag, to which a link in the snapshot points.
//!
//! The layout is that of Python's `huggingface_hub`. A blob appears under its name once it is complete and on disk; an
//! interrupted download leaves a partial file, from which the next one resumes. Commit, ETag and size come from the
//! server and are checked before anything is written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::mpsc::SyncSender,
};

use messages::FileName;

use crate::{
    download_event::DownloadEvent,
    files,
    http::{FileResponse, HttpClient, RequestFailure},
};

/// Bytes that are read at once.
const CHUNK: usize = 1 << 16;
/// Extension of a blob that is not complete.
const PARTIAL: &str = "part";

/// A file of a repository to be downloaded into the folder of the blobs.
pub(crate) struct Blob<'a> {
    pub(crate) folder: PathBuf,
    /// Repository, `ORG/NAME`.
    pub(crate) repository: &'a str,
    pub(crate) commit: &'a FileName,
    pub(crate) name: &'a FileName,
    pub(crate) events: &'a SyncSender<DownloadEvent>,
}

/// Reason why a blob could not be downloaded.
#[derive(Debug)]
pub(crate) enum BlobError {
    /// There is no usable response.
    Request(RequestFailure),
    /// The connection ended early; what was downloaded is kept.
    Interrupted(String),
    /// The server's answer is not usable, or a file cannot be written.
    Refused(String),
    /// The receiver was dropped.
    Abandoned,
}

/// Content that a server is about to send.
struct Content {
    response: ureq::Response,
    /// Offset of its first byte in the file.
    start: u64,
    /// Size of the whole file in bytes, where the server says it.
    size: Option<u64>,
}

impl Blob<'_> {
    /// Downloads the blob, or resumes its download; returns its path.
    ///
    /// # Errors
    /// When the server cannot be reached, names another commit, or sends an ETag that is not a plain file name, a file
    /// that is too large, or more or fewer bytes than it announced.
    pub(crate) fn fetch(&self, client: &HttpClient) -> Result<PathBuf, BlobError> {
        let first = self.request(client, None)?;
        self.check_commit(&first)?;
        let etag = self.etag(&first)?;
        let content = self.content(first)?;
        let path = self.folder.join(&etag);
        let length = |path: &Path| fs::metadata(path).map(|metadata| metadata.len()).ok();
        if content.size.is_some() && length(&path) == content.size {
            return Ok(path);
        }
        let partial = path.with_added_extension(PARTIAL);
        let content = match (length(&partial).filter(|&kept| kept > 0), content.size) {
            (Some(kept), Some(size)) if kept < size => {
                self.content(self.request(client, Some(kept))?)?
            }
            _ => content,
        };
        fs::create_dir_all(&self.folder).map_err(|error| self.unwritable(&self.folder, &error))?;
        self.store(content, &partial)?;
        fs::rename(&partial, &path).map_err(|error| self.unwritable(&path, &error))?;
        Ok(path)
    }

    fn request(&self, client: &HttpClient, from: Option<u64>) -> Result<FileResponse, BlobError> {
        let segments: Vec<&str> = self
            .repository
            .split('/')
            .chain(["resolve", self.commit.as_str(), self.name.as_str()])
            .collect();
        client.get(&segments, from).map_err(|error| match error {
            RequestFailure::Transport(reason) => BlobError::Interrupted(reason),
            other => BlobError::Request(other),
        })
    }

    fn check_commit(&self, found: &FileResponse) -> Result<(), BlobError> {
        match found.headers.commit.as_deref() {
            Some(commit) if commit == self.commit.as_str() => Ok(()),
            Some(other) => Err(self.refused(&format!("is of the commit {other:?}"))),
            None => Err(self.refused("comes without its commit")),
        }
    }

    fn etag(&self, found: &FileResponse) -> Result<FileName, BlobError> {
        let etag = found.headers.etag();
        let etag = etag.ok_or_else(|| self.refused("comes without an ETag"))?;
        FileName::new(etag).map_err(|error| self.refused(&format!("has an unusable ETag: {error}")))
    }

    /// The announced content, checked against the largest size that the file may have.
    fn content(&self, found: FileResponse) -> Result<Content, BlobError> {
        let FileResponse { response, headers } = found;
        let (start, size) = extent(&response);
        if let (Some(size), Some(linked)) = (size, headers.linked_size)
            && size != linked
        {
            return Err(self.refused(&format!("has {size} bytes, announced were {linked}")));
        }
        let size = size.or(headers.linked_size);
        let max = files::max_bytes(self.name);
        match size.filter(|&size| size > max) {
            Some(size) => Err(self.refused(&format!("has {size} bytes, more than {max}"))),
            None => Ok(Content {
                response,
                start,
                size,
            }),
        }
    }

    /// Writes the content to the file `partial`, behind what it has if the content begins there.
    fn store(&self, content: Content, partial: &Path) -> Result<(), BlobError> {
        let Content {
            response,
            start,
            size,
        } = content;
        let unwritable = |error: io::Error| self.unwritable(partial, &error);
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .map_err(unwritable)?;
        let kept = file.metadata().map_err(unwritable)?.len();
        if kept != start {
            file.set_len(0).map_err(unwritable)?;
        }
        if start != 0 && kept != start {
            return Err(BlobError::Interrupted(format!(
                "{} is sent from byte {start} on, not from {kept}",
                self.name
            )));
        }
        self.started(size)?;
        let written = self.copy(response.into_reader(), &mut file, start, size)?;
        match size.filter(|&size| written < size) {
            Some(size) => Err(BlobError::Interrupted(format!(
                "{} ended after {written} of {size} bytes",
                self.name
            ))),
            None => file.sync_all().map_err(unwritable),
        }
    }

    /// Appends what `reader` has; returns the size of the file.
    fn copy(
        &self,
        mut reader: impl Read,
        file: &mut File,
        start: u64,
        size: Option<u64>,
    ) -> Result<u64, BlobError> {
        let max = size.unwrap_or_else(|| files::max_bytes(self.name));
        let (mut chunk, mut written) = (vec![0; CHUNK], start);
        self.advance(start)?;
        loop {
            let count = match reader.read(&mut chunk) {
                Ok(0) => return Ok(written),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(BlobError::Interrupted(format!("{}: {error}", self.name)));
                }
            };
            written += count as u64;
            if written > max {
                // What came is not the file that was announced.
                file.set_len(0).ok();
                return Err(self.refused(&format!("has more than {max} bytes")));
            }
            let stored = file.write_all(chunk.get(..count).unwrap_or_default());
            stored.map_err(|error| self.unwritable(&self.folder, &error))?;
            self.advance(count as u64)?;
        }
    }

    fn started(&self, size: Option<u64>) -> Result<(), BlobError> {
        self.send(DownloadEvent::FileStarted(
            self.name.to_string(),
            size.unwrap_or(0),
        ))
    }

    fn advance(&self, bytes: u64) -> Result<(), BlobError> {
        self.send(DownloadEvent::Bytes(bytes))
    }

    /// Reports progress; after a timeout or cancellation the receiver is gone.
    fn send(&self, event: DownloadEvent) -> Result<(), BlobError> {
        self.events.send(event).map_err(|_| BlobError::Abandoned)
    }

    fn refused(&self, what: &str) -> BlobError {
        BlobError::Refused(format!("{} {what}", self.name))
    }

    fn unwritable(&self, path: &Path, error: &io::Error) -> BlobError {
        BlobError::Refused(format!("failed to write {}: {error}", path.display()))
    }
}

/// Offset of a response's first byte in the file, and the size of the file.
fn extent(response: &ureq::Response) -> (u64, Option<u64>) {
    let range = response.header("content-range").and_then(parsed_range);
    match range.filter(|_| response.status() == 206) {
        Some((start, size)) => (start, size),
        None => {
            let length = response.header("content-length");
            (0, length.and_then(|length| length.trim().parse().ok()))
        }
    }
}

/// First byte and size of `bytes FIRST-LAST/SIZE`, whose size may be `*`.
fn parsed_range(range: &str) -> Option<(u64, Option<u64>)> {
    let (span, size) = range.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = span.split_once('-')?;
    Some((first.trim().parse().ok()?, size.trim().parse().ok()))
}

/// Makes `link` a link to a blob of its repository; replaces a link to a blob that is gone.
///
/// # Errors
/// When it cannot be created, or something else has its name.
pub(crate) fn link(blob: &Path, link: &Path) -> io::Result<()> {
    let is_link = |metadata: fs::Metadata| metadata.file_type().is_symlink();
    if fs::symlink_metadata(link).is_ok_and(is_link) {
        fs::remove_file(link)?;
    }
    // From `snapshots/COMMIT/NAME` to `blobs/ETAG`.
    let name = blob.file_name().unwrap_or_default();
    #[cfg(unix)]
    std::os::unix::fs::symlink(Path::new("../../blobs").join(name), link)?;
    #[cfg(not(unix))]
    fs::copy(blob, link)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_parsed() {
        for (range, expected) in [
            ("bytes 0-0/12", Some((0, Some(12)))),
            ("bytes 5-11/12", Some((5, Some(12)))),
            ("bytes 5-11/*", Some((5, None))),
            ("bytes */12", None),
            ("items 0-1/2", None),
            ("", None),
        ] {
            assert_eq!(parsed_range(range), expected, "{range}");
        }
    }

    #[test]
    fn a_link_to_a_missing_blob_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let repository = folder.path();
        let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/c"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        let blob = blobs.join("abc");
        fs::write(&blob, "content").unwrap();
        let name = snapshot.join("config.json");
        for target in ["../../blobs/gone", "../../blobs/abc"] {
            fs::remove_file(&name).ok();
            #[cfg(unix)]
            std::os::unix::fs::symlink(target, &name).unwrap();
            link(&blob, &name).unwrap();
            assert_eq!(fs::read_to_string(&name).unwrap(), "content", "{target}");
        }
        let other = snapshot.join("other.json");
        fs::write(&other, "mine").unwrap();
        assert!(link(&blob, &other).is_err());
        assert_eq!(fs::read_to_string(&other).unwrap(), "mine");
    }
}
