//! TensorBoard event files of scalars.
//!
//! A file is a sequence of TFRecords: length, masked CRC-32C of the length, a protobuf `Event`, masked CRC-32C of
//! the event. Scalars need four protobuf field types only, which are encoded here. Every session of a run has a
//! file of its own that begins with a `SessionLog` start event; TensorBoard discards later steps of earlier files.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::TelemetryError;
use crate::metrics::measurements::Measurements;
use crate::run_dir::private::{create_private_directory, private_file};

/// File version of the first event.
const FILE_VERSION: &str = "brain.Event:2";

/// The event file of one session.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates a file in `directory` for a session that continues after `step`.
    pub(crate) fn create(directory: &Path, step: u64) -> Result<Self, TelemetryError> {
        create_private_directory(directory)
            .map_err(TelemetryError::file("create the directory", directory))?;
        let now = now();
        let (path, file) = create_new(directory, now.as_secs())?;
        let mut events = Self { path, file };
        events.write(&EventMessage::at(now, 0).text(3, FILE_VERSION))?;
        // Field 7 is `session_log`; its field 1 `status` is 1, `START`.
        let start = ProtoMessage::default().uint(1, 1);
        events.write(&EventMessage::at(now, step + 1).message(7, &start))?;
        Ok(events)
    }

    /// Appends the measurements of a step, as one event.
    pub(crate) fn append(
        &mut self,
        step: u64,
        measurements: &Measurements,
    ) -> Result<(), TelemetryError> {
        let mut summary = ProtoMessage::default();
        for (name, value) in measurements.iter() {
            summary = summary.message(1, &ProtoMessage::default().text(1, name).float(2, value));
        }
        self.write(&EventMessage::at(now(), step).message(5, &summary))
    }

    fn write(&mut self, event: &ProtoMessage) -> Result<(), TelemetryError> {
        let written = self.file.write_all(&record(&event.0));
        written.map_err(TelemetryError::file("append to", &self.path))
    }
}

fn now() -> Duration {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_1970.unwrap_or_default()
}

/// Creates a file whose name sorts after those of earlier sessions, as TensorBoard requires.
fn create_new(directory: &Path, seconds: u64) -> Result<(PathBuf, File), TelemetryError> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() {
        "localhost"
    } else {
        host.trim()
    };
    for count in 0_u64.. {
        let name = format!("events.out.tfevents.{seconds:010}.{host}.{count}");
        let path = directory.join(name);
        match private_file().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(TelemetryError::file("create", &path)(source)),
        }
    }
    unreachable!("a directory has fewer than 2^64 files")
}

/// A TFRecord: length, checksum, content, checksum.
fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(content.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(content);
    record.extend(masked_crc(content).to_le_bytes());
    record
}

/// Masked CRC-32C of TFRecords: rotated by 15 bits, plus a constant.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// Encoder of a protobuf message.
#[derive(Debug, Default)]
struct ProtoMessage(Vec<u8>);

/// Encoder of an `Event`: `wall_time` in seconds since 1970 is field 1, `step` is field 2.
struct EventMessage;

impl EventMessage {
    fn at(time: Duration, step: u64) -> ProtoMessage {
        ProtoMessage::default()
            .double(1, time.as_secs_f64())
            .uint(2, step)
    }
}

impl ProtoMessage {
    fn uint(self, field: u32, value: u64) -> Self {
        self.tag(field, 0).varint(value)
    }

    fn double(self, field: u32, value: f64) -> Self {
        self.tag(field, 1).bytes(&value.to_le_bytes())
    }

    fn text(self, field: u32, text: &str) -> Self {
        self.tag(field, 2)
            .varint(text.len() as u64)
            .bytes(text.as_bytes())
    }

    fn message(self, field: u32, message: &Self) -> Self {
        self.tag(field, 2)
            .varint(message.0.len() as u64)
            .bytes(&message.0)
    }

    /// A 32-bit float, the type of scalars.
    fn float(self, field: u32, value: f64) -> Self {
        self.tag(field, 5).bytes(&(value as f32).to_le_bytes())
    }

    fn tag(self, field: u32, wire_type: u32) -> Self {
        self.varint(u64::from(field << 3 | wire_type))
    }

    fn varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contents of all records of a file; verifies the checksums.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_at(8);
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked_crc(length).to_le_bytes());
            let count = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let (content, rest) = rest.split_at(count);
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked_crc(content).to_le_bytes());
            records.push(content.to_vec());
            bytes = rest;
        }
        records
    }

    #[test]
    fn checksums_match_the_format() {
        // The value for 32 zeros is in RFC 3720, B.4.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(
            masked_crc(&[0; 32]),
            0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
    }

    #[test]
    fn messages_are_encoded_as_protobuf() {
        let cases: [(ProtoMessage, &[u8]); 5] = [
            (ProtoMessage::default().uint(1, 150), &[0x08, 0x96, 0x01]),
            (
                ProtoMessage::default().text(2, "testing"),
                b"\x12\x07testing",
            ),
            (
                ProtoMessage::default().float(2, 1.0),
                &[0x15, 0, 0, 0x80, 0x3f],
            ),
            (
                ProtoMessage::default().double(1, 1.0),
                &[0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f],
            ),
            (
                ProtoMessage::default().message(3, &ProtoMessage::default().uint(1, 150)),
                &[0x1a, 0x03, 0x08, 0x96, 0x01],
            ),
        ];
        for (message, expected) in cases {
            assert_eq!(message.0, expected);
        }
    }

    #[test]
    fn every_session_has_a_file_and_every_step_a_record() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = EventFile::create(directory.path(), 0).unwrap();
        let step = [("loss", 0.5), ("eval/win_rate", f64::NAN)];
        first.append(300, &step.into_iter().collect()).unwrap();
        let second = EventFile::create(directory.path(), 200).unwrap();
        assert!(
            first.path < second.path,
            "{:?} {:?}",
            first.path,
            second.path
        );

        let seen = records(&fs::read(&first.path).unwrap());
        assert_eq!(seen.len(), 3);
        assert!(seen[0].ends_with(b"\x1a\x0dbrain.Event:2"), "{:?}", seen[0]);
        let summary = b"\x10\xac\x02\x2a\x23\x0a\x0b\x0a\x04loss\x15\0\0\0\x3f\x0a\x14\x0a\x0deval/win_rate\x15";
        let value = f32::NAN.to_le_bytes();
        assert_eq!(seen[2][9..], [&summary[..], &value[..]].concat());
        let start = records(&fs::read(&second.path).unwrap())[1].clone();
        assert_eq!(start[9..], *b"\x10\xc9\x01\x3a\x02\x08\x01");
    }
}
