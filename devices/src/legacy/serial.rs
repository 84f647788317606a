//! 16550A serial port: vm-superio's registers, with flow control on both sides.
//!
//! A UART loses input while the driver does not read, and output while the line
//! is blocked. Neither is acceptable for a console:
//!
//! - **Input** waits in a queue until the guest's driver has enabled the receive
//!   interrupt, and enters the 64-byte FIFO as the guest empties it. A driver
//!   that opens the port reads the receive buffer to clear it; while the receive
//!   interrupt is off such a read removes nothing. So a line typed before the
//!   guest has booted, or a large paste, arrives whole. A guest that only polls
//!   the port receives nothing.
//! - **Output** goes to a [`SerialSink`]. While the sink has no room the line
//!   status shows a busy transmitter, so the guest waits as it would for
//!   hardware; a byte that it transmits anyway is lost and counted.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use iommu::lock::RankedMutex;

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// Bytes of register space of the port.
pub const SERIAL_LEN: u64 = 8;

/// Upper bound on bytes of input that wait for the guest.
const INPUT_LIMIT: usize = 64 * 1024;

const DATA: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const IER_RECEIVE: u8 = 1 << 0;
const IIR_NONE: u8 = 1 << 0;
const IIR_RECEIVED: u8 = 1 << 2;
const LCR_DIVISOR_ACCESS: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;

/// Receives the bytes that the guest transmits. Called on the vCPU thread with
/// the port's lock held: it must neither block nor call the port.
pub trait SerialSink: Send + Sync {
    /// Writes one byte. `false` when there is no room and the byte is lost.
    fn put(&self, byte: u8) -> bool;
    /// Whether there is room for a transmit FIFO (at least 64 bytes). A sink
    /// that returned `false` calls [`SerialPort::transmitter_ready`] when that
    /// changes.
    fn ready(&self) -> bool;
}

/// Counters of a port since it was created.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes the guest received.
    pub received: AtomicU64,
    /// Bytes the guest transmitted.
    pub transmitted: AtomicU64,
    /// Bytes the guest transmitted while the transmitter was busy.
    pub lost: AtomicU64,
}

/// A serial port on a bus.
pub struct SerialPort {
    port: RankedMutex<Port, 2>,
    counters: Arc<SerialCounters>,
}

struct Port {
    uart: vm_superio::Serial<Line, NoEvents, Transmitter>,
    sink: Arc<dyn SerialSink>,
    /// Input that has not entered the FIFO yet.
    waiting: VecDeque<u8>,
    /// Signalled when there is room after input was refused.
    input_drained: EventFd,
    input_refused: bool,
    /// The guest has seen a busy transmitter and waits for its interrupt.
    transmitter_busy: bool,
}

impl SerialPort {
    /// A port that interrupts through `line` and transmits to `sink`.
    /// `input_drained` is signalled when there is room again after
    /// [`SerialPort::input`] refused bytes.
    pub fn new(
        line: Arc<dyn IrqLine>,
        sink: Arc<dyn SerialSink>,
        input_drained: EventFd,
        counters: Arc<SerialCounters>,
    ) -> Self {
        let transmitter = Transmitter {
            sink: Arc::clone(&sink),
            counters: Arc::clone(&counters),
        };
        let port = Port {
            uart: vm_superio::Serial::new(Line(line), transmitter),
            sink,
            waiting: VecDeque::new(),
            input_drained,
            input_refused: false,
            transmitter_busy: false,
        };
        Self {
            port: RankedMutex::new(port),
            counters,
        }
    }

    /// Queues bytes for the guest, in order. Returns the number of queued
    /// bytes: all of them unless 64 KiB wait.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.port.lock();
        let taken = bytes.len().min(INPUT_LIMIT - port.waiting.len());
        port.waiting.extend(bytes.iter().take(taken));
        port.input_refused = taken < bytes.len();
        port.feed();
        taken
    }

    /// Interrupts the guest, if it waits for the transmitter.
    pub fn transmitter_ready(&self) {
        let mut port = self.port.lock();
        if std::mem::take(&mut port.transmitter_busy) {
            port.raise_transmitter_interrupt();
        }
    }
}

impl BusDevice for SerialPort {
    /// Registers are bytes: an access of another width reads as all ones.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            *value = self.port.lock().read(offset, &self.counters);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[value]) = (u8::try_from(offset), data) {
            self.port.lock().write(offset, value);
        }
    }
}

impl Port {
    fn read(&mut self, offset: u8, counters: &SerialCounters) -> u8 {
        match offset {
            DATA if !self.divisor_access() => {
                if !self.receiving() && !self.looped() {
                    return 0;
                }
                let had = self.uart.fifo_capacity();
                let byte = self.uart.read(DATA);
                if self.uart.fifo_capacity() > had {
                    counters.received.fetch_add(1, Ordering::Relaxed);
                }
                self.feed();
                byte
            }
            LSR => {
                let status = self.uart.read(LSR);
                if self.sink.ready() {
                    return status;
                }
                self.transmitter_busy = true;
                status & !LSR_TRANSMITTER_EMPTY
            }
            IIR => self.identify(),
            _ => self.uart.read(offset),
        }
    }

    /// Value of IIR. vm-superio clears the received-data interrupt after the
    /// first read; a UART reports it until the FIFO is empty. A driver that
    /// reads a limited amount each time (Linux: 256 bytes) reads IIR to decide
    /// whether to continue, and the line is a pulse, so it gets no other
    /// notification.
    fn identify(&mut self) -> u8 {
        let cause = self.uart.read(IIR);
        if cause & IIR_NONE != 0 && self.receiving() && self.data_ready() {
            return cause & !IIR_NONE | IIR_RECEIVED;
        }
        cause
    }

    fn write(&mut self, offset: u8, value: u8) {
        // No error is possible: the transmitter and the line never fail.
        let _ = self.uart.write(offset, value);
        if matches!(offset, IER | LCR | MCR) {
            self.feed();
        }
    }

    /// Fills an empty FIFO while the receive interrupt is enabled. Only an
    /// empty one, for one interrupt per FIFO instead of one per byte.
    fn feed(&mut self) {
        if self.looped() || !self.receiving() {
            return;
        }
        while !self.data_ready() && !self.waiting.is_empty() {
            let (head, _) = self.waiting.as_slices();
            let Ok(taken @ 1..) = self.uart.enqueue_raw_bytes(head) else {
                break;
            };
            self.waiting.drain(..taken);
        }
        if self.input_refused && self.waiting.len() <= INPUT_LIMIT / 2 {
            self.input_refused = false;
            // A full counter means that it is signalled already.
            let _ = self.input_drained.write(1);
        }
    }

    /// Rewrites IER: vm-superio raises this interrupt when IER is written with
    /// its bit set, because its transmitter is always empty.
    fn raise_transmitter_interrupt(&mut self) {
        let line_control = self.uart.read(LCR);
        let _ = self.uart.write(LCR, line_control & !LCR_DIVISOR_ACCESS);
        let enabled = self.uart.read(IER);
        let _ = self.uart.write(IER, enabled);
        let _ = self.uart.write(LCR, line_control);
    }

    fn divisor_access(&mut self) -> bool {
        self.uart.read(LCR) & LCR_DIVISOR_ACCESS != 0
    }

    /// Whether the FIFO has data.
    fn data_ready(&mut self) -> bool {
        self.uart.read(LSR) & LSR_DATA_READY != 0
    }

    fn looped(&mut self) -> bool {
        self.uart.read(MCR) & MCR_LOOP != 0
    }

    /// Whether the receive interrupt is enabled. `false` while the guest
    /// accesses the divisor latch, which replaces IER.
    fn receiving(&mut self) -> bool {
        !self.divisor_access() && self.uart.read(IER) & IER_RECEIVE != 0
    }
}

/// An edge-triggered line on both architectures: a pulse is one interrupt.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        self.0.set(false);
        Ok(())
    }
}

struct Transmitter {
    sink: Arc<dyn SerialSink>,
    counters: Arc<SerialCounters>,
}

impl io::Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            let counter = if self.sink.put(byte) {
                &self.counters.transmitted
            } else {
                &self.counters.lost
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use super::*;

    const RECEIVE_AND_TRANSMIT: u8 = IER_RECEIVE | 1 << 1;

    #[derive(Default)]
    struct CountedLine(AtomicU64);

    impl IrqLine for CountedLine {
        fn set(&self, high: bool) {
            self.0.fetch_add(u64::from(high), Ordering::Relaxed);
        }
    }

    #[derive(Default)]
    struct Sink {
        blocked: AtomicBool,
        bytes: Mutex<Vec<u8>>,
    }

    impl SerialSink for Sink {
        fn put(&self, byte: u8) -> bool {
            let room = self.ready();
            if room {
                self.bytes.lock().unwrap().push(byte);
            }
            room
        }
        fn ready(&self) -> bool {
            !self.blocked.load(Ordering::Relaxed)
        }
    }

    struct Rig {
        port: SerialPort,
        line: Arc<CountedLine>,
        sink: Arc<Sink>,
        drained: EventFd,
    }

    impl Rig {
        fn new() -> Self {
            let line = Arc::new(CountedLine::default());
            let sink = Arc::new(Sink::default());
            let drained = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let port = SerialPort::new(
                line.clone(),
                sink.clone(),
                drained.try_clone().unwrap(),
                Arc::default(),
            );
            Self {
                port,
                line,
                sink,
                drained,
            }
        }

        fn read(&self, offset: u8) -> u8 {
            let mut data = [0];
            self.port.read(offset.into(), &mut data);
            data[0]
        }

        fn write(&self, offset: u8, value: u8) {
            self.port.write(offset.into(), &[value]);
        }

        fn interrupts(&self) -> u64 {
            self.line.0.swap(0, Ordering::Relaxed)
        }

        /// Reads until the FIFO is empty, as a driver's interrupt handler does.
        fn receive_all(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.read(LSR) & LSR_DATA_READY != 0 {
                bytes.push(self.read(DATA));
            }
            bytes
        }
    }

    #[test]
    fn input_before_the_receive_interrupt_is_enabled_arrives_whole() {
        let rig = Rig::new();
        assert_eq!(rig.port.input(b"typed early\n"), 12);
        // Linux reads the receive buffer twice when it opens the port.
        assert_eq!((rig.read(DATA), rig.read(DATA)), (0, 0));
        rig.write(IER, RECEIVE_AND_TRANSMIT);
        assert_ne!(rig.interrupts(), 0);
        assert_eq!(rig.receive_all(), b"typed early\n");
    }

    #[test]
    fn input_in_the_fifo_survives_a_close_and_open() {
        let rig = Rig::new();
        rig.write(IER, IER_RECEIVE);
        rig.port.input(b"abc");
        rig.write(IER, 0);
        assert_eq!(rig.read(DATA), 0);
        rig.write(IER, IER_RECEIVE);
        assert_eq!(rig.receive_all(), b"abc");
    }

    #[test]
    fn a_paste_larger_than_the_fifo_arrives_whole_and_in_order() {
        let rig = Rig::new();
        rig.write(IER, IER_RECEIVE);
        let paste: Vec<u8> = (0..10_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        assert_eq!(rig.port.input(&paste), paste.len());
        assert_eq!(rig.interrupts(), 1);
        assert_eq!(rig.receive_all(), paste);
        assert_eq!(rig.port.counters.received.load(Ordering::Relaxed), 10_000);
        // One interrupt per filled FIFO.
        assert_eq!(rig.interrupts(), 10_000 / 64);
    }

    #[test]
    fn a_driver_that_reads_a_limited_amount_is_notified_of_the_rest() {
        let rig = Rig::new();
        rig.write(IER, IER_RECEIVE);
        // Ten bytes, so that the rest is not a multiple of the driver's limit.
        rig.port.input(&[b'x'; 10]);
        rig.port.input(&[b'y'; 1000]);
        let mut received = 0;
        while rig.read(IIR) & IIR_NONE == 0 {
            for _ in 0..256 {
                if rig.read(LSR) & LSR_DATA_READY == 0 {
                    break;
                }
                rig.read(DATA);
                received += 1;
            }
        }
        assert_eq!(received, 1010);
    }

    #[test]
    fn received_data_does_not_interrupt_a_driver_that_masks_it() {
        let rig = Rig::new();
        rig.write(IER, IER_RECEIVE);
        rig.port.input(b"a");
        rig.read(IIR);
        assert_eq!(rig.read(IIR) & IIR_NONE, 0);
        rig.write(IER, 0);
        rig.read(IIR);
        assert_eq!(rig.read(IIR) & IIR_NONE, IIR_NONE);
    }

    #[test]
    fn input_beyond_the_limit_is_left_to_the_caller_until_there_is_room() {
        let rig = Rig::new();
        let paste = vec![b'x'; INPUT_LIMIT + 1];
        assert_eq!(rig.port.input(&paste), INPUT_LIMIT);
        assert!(rig.drained.read().is_err());
        rig.write(IER, IER_RECEIVE);
        assert_eq!(rig.receive_all().len(), INPUT_LIMIT);
        assert!(rig.drained.read().is_ok());
        assert_eq!(rig.port.input(b"x"), 1);
        assert!(rig.drained.read().is_err());
    }

    #[test]
    fn a_blocked_sink_shows_as_a_busy_transmitter_until_it_drains() {
        let rig = Rig::new();
        rig.write(IER, RECEIVE_AND_TRANSMIT);
        rig.write(DATA, b'a');
        rig.sink.blocked.store(true, Ordering::Relaxed);
        assert_eq!(rig.read(LSR) & LSR_TRANSMITTER_EMPTY, 0);
        rig.write(DATA, b'b');
        assert_eq!(rig.port.counters.lost.load(Ordering::Relaxed), 1);
        rig.read(IIR); // Acknowledges the interrupt.
        rig.interrupts();

        rig.sink.blocked.store(false, Ordering::Relaxed);
        rig.write(LCR, LCR_DIVISOR_ACCESS);
        rig.port.transmitter_ready();
        assert_eq!(rig.interrupts(), 1);
        rig.write(LCR, 3);
        assert_eq!(rig.read(LSR) & LSR_TRANSMITTER_EMPTY, LSR_TRANSMITTER_EMPTY);
        rig.write(DATA, b'c');
        assert_eq!(*rig.sink.bytes.lock().unwrap(), b"ac");
        assert_eq!(rig.port.counters.transmitted.load(Ordering::Relaxed), 2);

        rig.read(IIR);
        rig.interrupts();
        rig.port.transmitter_ready();
        assert_eq!(rig.interrupts(), 0);
    }

    #[test]
    fn loopback_returns_transmitted_bytes_and_no_input() {
        let rig = Rig::new();
        rig.write(MCR, MCR_LOOP);
        rig.port.input(b"typed");
        rig.write(DATA, b'l');
        assert_eq!(rig.read(DATA), b'l');
        rig.write(IER, IER_RECEIVE);
        assert_eq!(rig.read(LSR) & 1, 0);
        rig.write(MCR, 0x08);
        assert_eq!(rig.receive_all(), b"typed");
        assert!(rig.sink.bytes.lock().unwrap().is_empty());
    }

    #[test]
    fn the_divisor_latch_hides_the_data_register() {
        let rig = Rig::new();
        rig.write(IER, IER_RECEIVE);
        rig.port.input(b"z");
        rig.write(LCR, LCR_DIVISOR_ACCESS);
        rig.write(DATA, 0x55);
        assert_eq!(rig.read(DATA), 0x55);
        rig.write(LCR, 3);
        assert_eq!(rig.receive_all(), b"z");
    }
}
