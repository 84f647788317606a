//! Devices that are not on PCI: serial port, clocks, power control.

mod cmos;
mod power;
mod rtc;
mod serial;

pub use cmos::{CMOS_LEN, Cmos};
pub use power::PowerRegister;
pub use rtc::{Pl031, RTC_LEN};
pub use serial::{SERIAL_LEN, SerialCounters, SerialPort, SerialSink};
